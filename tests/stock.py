"""Stock tasks of lm-eval on a local mirror, in the columns of the hub's data sets."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.files import sha256
from stages.job.params import Params
from tests.pipeline import do, download, params
from tests.scoring import changed

ROWS: dict[str, tuple[str, dict[str, list[dict[str, Any]]]]] = {
    "gsm8k": (
        "main",
        {
            "train": [{"question": f"{i} and 1?", "answer": f"More.\n#### {i + 1}"} for i in range(4)],
            "test": [{"question": f"{i} and 2?", "answer": f"More.\n#### {i + 2}"} for i in range(3)],
        },
    ),
    "arc_easy": (
        "ARC-Easy",
        {
            "test": [
                {
                    "id": f"q{i}", "question": "Which is wet?", "answerKey": "B",
                    "choices": {"text": ["sand", "water", "iron", "glass"], "label": ["A", "B", "C", "D"]},
                }
                for i in range(3)
            ]
        },
    ),
    "winogrande": (
        "winogrande_xl",
        {
            "validation": [
                {
                    "sentence": "The cup did not fit the box because _ was large.",
                    "option1": "the cup", "option2": "the box", "answer": str(1 + i % 2),
                }
                for i in range(3)
            ]
        },
    ),
    "truthfulqa_mc2": (
        "multiple_choice",
        {
            "validation": [
                {
                    "question": "Is water wet?",
                    "mc1_targets": {"choices": ["Yes", "No"], "labels": [1, 0]},
                    "mc2_targets": {"choices": ["Yes", "It is", "No"], "labels": [1, 1, 0]},
                }
                for _ in range(3)
            ]
        },
    ),
    "arc_challenge": (
        "ARC-Challenge",
        {
            "test": [
                {
                    "id": f"q{i}", "question": "Which is hard?", "answerKey": "A",
                    "choices": {"text": ["iron", "air", "milk", "silk"], "label": ["A", "B", "C", "D"]},
                }
                for i in range(3)
            ]
        },
    ),
    "truthfulqa_mc1": (
        "multiple_choice",
        {
            "validation": [
                {
                    "question": f"Is {i} a number?",
                    "mc1_targets": {"choices": ["Yes", "No", "By day"], "labels": [1, 0, 0]},
                    "mc2_targets": {"choices": ["Yes", "No"], "labels": [1, 0]},
                }
                for i in range(30)
            ]
        },
    ),
    "hellaswag": (
        "default",
        {
            "validation": [
                {
                    "ind": i, "activity_label": "Cooking", "ctx_a": "A man cuts bread.", "ctx_b": "he",
                    "ctx": "A man cuts bread. he", "endings": ["eats it.", "flies.", "rains.", "sings it."],
                    "source_id": "a", "split": "val", "split_type": "indomain", "label": str(i),
                }
                for i in range(3)
            ]
        },
    ),
    "piqa": (
        "plain_text",
        {"validation": [{"goal": "Cut bread", "sol1": "Use a knife.", "sol2": "Use a spoon.", "label": i % 2}
                        for i in range(3)]},
    ),
    "boolq": (
        "boolq",
        {"validation": [{"question": "is ice cold", "passage": "Ice is cold.", "idx": i, "label": 1}
                        for i in range(3)]},
    ),
    "lambada_openai": (
        "default",
        {"test": [{"text": "The cat sat on the mat and the dog sat on the rug"} for _ in range(3)]},
    ),
    "wikitext": (
        "wikitext-2-raw-v1",
        {"test": [{"page": f" = Cats = \n \n The cat number {i} sat on the mat . \n"} for i in range(3)]},
    ),
    "wikitext_lines": (
        "wikitext-2-v1",
        {
            "test": [
                {"text": line}
                for i in range(3)
                for line in (
                    "", f" = Cats {i} = \n", "", " The cat sat . \n", "", " = = Food = = \n", "",
                    " = milk = \n", " and fish . \n",
                )
            ]
        },
    ),
    "hendrycks_math500": (
        "default",
        {
            "test": [
                {
                    "problem": "What is 1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2",
                    "subject": "Algebra", "level": 1, "unique_id": str(i),
                }
                for i in range(3)
            ]
        },
    ),
    "aime24": (
        "default",
        {"train": [{"ID": f"2024-I-{i}", "Problem": "What is 1+1?", "Solution": "2", "Answer": 2}
                   for i in range(3)]},
    ),
    "amc23": (
        "default",
        {"test": [{"id": i, "question": "What is 1+1?", "answer": "2.0", "url": ""} for i in range(3)]},
    ),
    "gpqa_diamond_zeroshot": (
        "gpqa_diamond",
        {
            "train": [
                {
                    "Question": f"Which is number {i}?", "Correct Answer": f"right {i}",
                    "Incorrect Answer 1": "wrong", "Incorrect Answer 2": "bad", "Incorrect Answer 3": "no",
                }
                for i in range(30)
            ]
        },
    ),
    "ifeval": (
        "default",
        {
            "train": [
                {
                    "key": i, "prompt": "Write, in English, with neither comma nor a star.",
                    "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"],
                    "kwargs": [{"num_bullets": None}, {"num_bullets": 1}],
                }
                for i in range(3)
            ]
        },
    ),
    "xsum_rouge": (
        "default",
        {
            "test": [
                {"document": "A cat sat on a mat in Rome.", "summary": "A cat sat on a mat.", "id": str(i)}
                for i in range(3)
            ]
        },
    ),
    "humaneval": (
        "openai_humaneval",
        {
            "test": [
                {
                    "task_id": f"HumanEval/{i}", "prompt": "def one():\n", "entry_point": "one",
                    "canonical_solution": "    return 1\n",
                    "test": "def check(candidate):\n    assert candidate() == 1\n",
                }
                for i in range(3)
            ]
        },
    ),
    "mbpp": (
        "full",
        {
            "test": [
                {
                    "task_id": i, "text": "Write a function that gives one.", "code": "def one(): return 1",
                    "test_list": ["assert one() == 1", "assert one() < 2", "assert one() > 0"],
                    "test_setup_code": "", "challenge_test_list": [],
                }
                for i in range(3)
            ]
        },
    ),
}  # fmt: skip
"""The config and the splits of each task's data set."""
FOLDERS = (
    "gsm8k", "arc", "winogrande", "truthfulqa", "hellaswag", "piqa", "super_glue/boolq", "lambada",
    "wikitext", "hendrycks_math", "aime", "gpqa/zeroshot", "humaneval", "mbpp", "mmlu/default",
    "leaderboard/musr", "ifeval",
)  # fmt: skip


def mirrored(
    task: str,
    options: dict[str, Any],
    without: str | None = None,
    configs: dict[str, dict[str, list[dict[str, Any]]]] | None = None,
) -> Params:
    """Write a mirror of a stock task's data, download it, and return params with its suite.

    Args:
        configs: the splits of each config of a data set that has several; ROWS has the others.
    """
    mirror, configs = Path("mirror"), configs or dict([ROWS[task]])
    names = list(configs)
    for config, splits in configs.items():
        (mirror / config).mkdir(parents=True)
        for split, rows in splits.items():
            if split != without:
                pd.DataFrame(rows).to_parquet(mirror / config / f"{split}.parquet")
    name = task.replace("_", "-")
    chosen = params("llama", {})
    datasets = json.loads(chosen.model_dump_json())["datasets"]
    datasets[name] = {
        "kind": "benchmark", "source": "path:mirror",
        "config": names if len(names) > 1 else names[0],
        "sha256": sha256(mirror if len(names) > 1 else mirror / names[0]),
    }  # fmt: skip
    suites = {"perplexity": {}, "graded": {}, "benchmark": {name: {"task": task, "batch_size": 2, **options}}}
    project = changed(chosen, datasets=datasets, suites=suites)
    do(project)
    download(project, f"datasets/{name}")
    return project

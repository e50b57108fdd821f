"""Tasks and metrics are looked for before anything is downloaded."""

import json
from pathlib import Path

import pytest

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.job.checks import own_tasks
from stages.job.checks.learning import of_conversations
from stages.job.checks.own_tasks import of_tasks
from stages.job.load import checked_params
from tests import project
from tests.owntask import write_task


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path / "inputs")
    values = project.params(tmp_path / "inputs")
    write_task(Path("mine"))
    task = {"kind": "task", "source": "path:mine", "yaml": "qa.yaml", "sha256": sha256(Path("mine"))}
    values["datasets"]["qa"] = task
    values["suites"]["benchmark"] = {"qa": {"task": "path:mine/qa.yaml"}}
    return values


def replaced(old: str, new: str) -> None:
    file = Path("mine/qa.yaml")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_sound_task_passes(raw):
    assert list(of_tasks(checked_params(raw))) == []


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "metric: exact_match",
            "metric: exact_mach",
            "names the metric 'exact_mach'; did you mean 'exact_match'?",
        ),
        (
            "test: test.jsonl",
            "train: test.jsonl",
            "is scored on test, but its data_files have train; set test_split",
        ),
        ("test: test.jsonl", "test: lost.jsonl", "names lost.jsonl, which is no file of its folder"),
        ("task: qa", "tusk: qa", "defines no single task"),
        ("output_type: generate_until", "output_type: generate_untill", "did you mean 'generate_until'?"),
        (
            "{{question}}",
            "{{quastion}}",
            "names quastion; the columns of its data are answer, level, question",
        ),
        (
            'doc_to_target: "{{answer}}"',
            "doc_to_target: anwser",
            "doc_to_target of qa.yaml is 'anwser', no column; its data have answer, level, question",
        ),
        ("{{question}}", "{{question}", "doc_to_text of qa.yaml is no template ("),
        ("task: qa", "task: [qa", 'mine/qa.yaml", line'),
    ],
)
def test_a_task_that_could_not_run_is_named(old, new, sentence, raw):
    replaced(old, new)
    (mistake,) = of_tasks(checked_params(raw))
    assert mistake.startswith("datasets.qa") and sentence in mistake


@pytest.mark.parametrize(
    ("answer", "sound"),
    [
        (0, True),
        (2, True),
        ("red", True),
        ([0, 2], True),
        (3, False),
        (-1, False),
        ("A", False),
        ([0, 3], False),
    ],
)
def test_an_answer_that_is_no_choice_is_named(answer, sound, raw):
    """lm-eval counts it as wrong without a word."""
    file = Path("mine/qa.yaml")
    text = file.read_text().replace("output_type: generate_until", "output_type: multiple_choice")
    text = text.replace('doc_to_target: "{{answer}}"', "doc_to_target: answer\ndoc_to_choice: choices")
    file.write_text(text)
    rows = [
        {"question": "which?", "choices": ["red", "green", "blue"], "answer": 1, "level": "a"},
        {"question": "and now?", "choices": ["red", "green", "blue"], "answer": answer, "level": "a"},
    ]
    Path("mine/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw["datasets"]["qa"]["sha256"] = sha256(Path("mine"))
    told = [mistake for mistake in of_tasks(checked_params(raw)) if "choices" in mistake]
    expected = (
        f"item 2 of test.jsonl has the answer {answer!r} in answer, but its choices are 'red', 'green', "
    )
    assert told == [] if sound else len(told) == 1 and expected in told[0]


def test_choices_that_are_templates_are_left_to_lm_eval(raw):
    file = Path("mine/qa.yaml")
    text = file.read_text().replace("output_type: generate_until", "output_type: multiple_choice")
    choices = 'doc_to_choice: ["{{answer}}", "{{question}}"]'
    file.write_text(text.replace('doc_to_target: "{{answer}}"', f"doc_to_target: answer\n{choices}"))
    raw["datasets"]["qa"]["sha256"] = sha256(Path("mine"))
    assert list(of_tasks(checked_params(raw))) == []


def test_a_file_in_place_of_the_folder_is_named(raw):
    raw["datasets"]["qa"]["source"] = "path:mine/qa.yaml"
    raw["suites"]["benchmark"]["qa"]["task"] = "path:mine/qa.yaml/qa.yaml"
    (mistake,) = of_tasks(checked_params(raw))
    assert "path:mine/qa.yaml is a file; name the folder" in mistake


def test_a_name_that_is_no_task_of_lm_eval_is_named(raw, monkeypatch):
    words = {"kind": "benchmark", "source": "hub:org/words@" + "0" * 40, "config": "main"}
    raw["datasets"]["words"] = words
    raw["suites"]["benchmark"]["words"] = {"task": "gsm8kk"}
    monkeypatch.setattr(
        own_tasks, "_tasks", lambda: frozenset({"gsm8k", "mmlu"})
    )  # reading all takes seconds
    (mistake,) = of_tasks(checked_params(raw))
    assert "suites.benchmark.words.task: lm-eval has no task 'gsm8kk'; did you mean gsm8k?" in mistake
    for known in ("gsm8k", "amc23"):
        raw["suites"]["benchmark"]["words"] = {"task": known}
        assert list(of_tasks(checked_params(raw))) == []


def test_the_names_of_lm_evals_metrics_are_read_off_its_source():
    from lm_eval.api import metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    assert set(own_tasks._metrics()) == set(metric_registry)


@pytest.mark.drill
def test_the_names_of_lm_evals_tasks_are_read_off_its_files():
    from lm_eval.tasks import TaskManager

    assert set(TaskManager().all_tasks) <= own_tasks._tasks()


def test_a_suite_of_ones_own_task_needs_its_data_set(raw):
    entry = raw["datasets"].pop("qa")
    with pytest.raises(
        Refusal, match=f"{{kind: task, source: path:mine, yaml: qa.yaml, sha256: {entry['sha256']}}}"
    ):
        checked_params(raw)
    raw["suites"]["benchmark"]["qa"]["task"] = "path:mine"
    with pytest.raises(
        Refusal, match="path:mine is no YAML file in a folder; name one that lies with its data"
    ):
        checked_params(raw)


def test_a_suite_and_its_data_set_name_the_same_task(raw):
    raw["suites"]["benchmark"]["qa"]["task"] = "gsm8k"
    with pytest.raises(Refusal, match=r"'gsm8k' given, but datasets.qa is .*; write task: path:mine/qa.yaml"):
        checked_params(raw)


def test_conversations_are_read_before_anything_runs(raw):
    Path("chats.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    chats = {"kind": "conversations", "source": "path:chats.jsonl", "sha256": sha256(Path("chats.jsonl"))}
    raw["datasets"]["chats"] = chats
    lora = raw["finetune"]["wanda-50-lora"]
    lora["train"] = {"dataset": "chats", "num_samples": 2, "held_out": 1, "chat_template": True}
    (mistake,) = of_conversations(checked_params(raw))
    assert mistake.startswith(
        "finetune.wanda-50-lora.train: num_samples 2 and held_out 1 take 3 conversations"
    )
    Path("chats.jsonl").write_text('{"prompt": "a"}\n')
    chats["sha256"] = sha256(Path("chats.jsonl"))
    (mistake,) = of_conversations(checked_params(raw))
    assert mistake.startswith("datasets.chats: path:chats.jsonl: line 1 has neither prompt and response nor")
    raw["teach"] = {"more": {"source": "base/tiny", "method": "logits", "dataset": "chats", "batch_size": 2}}
    with pytest.raises(Refusal, match="chats is conversations, which have their responses; train on them"):
        checked_params(raw)

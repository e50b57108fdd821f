"""Data sets that a model makes: its logits are its own, its answers what it says, and both are made once."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.corpus.examples import Train, few_shot, load
from stages.corpus.rows import IGNORED, Batch, Example, collate
from stages.corpus.taught import read
from stages.job.load import validate
from stages.job.params import Params
from stages.model.artifact import load_tokenizer
from stages.recovery.objective import loss, predictions
from stages.recovery.tuning import Distillation
from stages.reporting.words import read_by
from stages.teaching.answers import finished_answer, generated
from tests import families, pipeline, project
from tests.pipeline import download, teach

LOGITS = {
    "source": "base/tiny", "method": "logits", "dataset": "news", "num_samples": 5, "held_out": 3,
    "sequence_length": 24, "top": 8, "batch_size": 2,
}  # fmt: skip
ANSWERS = {
    "source": "base/tiny", "method": "answers", "dataset": "sums", "num_samples": 6, "held_out": 2,
    "max_new_tokens": 6, "batch_size": 3,
}  # fmt: skip

SUMS = {
    "kind": "arithmetic", "seed": 1, "test": 4, "train": 8, "fewshot": 0,
    "levels": [
        {"name": "one", "operator": "-", "digits": 1, "carries": False},
        {"name": "two", "operator": "+", "digits": 2, "carries": True},
    ],
}  # fmt: skip


def params(**teaching: dict[str, Any]) -> Params:
    """Params in fp32 with one base, news, sums to learn, and the given recipes of teach."""
    raw = project.params(Path("inputs"))
    raw["run"]["dtype"] = "float32"
    raw["datasets"]["sums"] = SUMS
    raw["teach"] = teaching
    return validate(raw)


def taught(**options: Any) -> Params:
    """Make the data set `made`, answers if `method` says no other, with options over those above."""
    base = ANSWERS if options.get("method", "answers") == "answers" else LOGITS
    chosen = params(made=base | options)
    for name in ("datasets/news", "datasets/sums", "base/tiny"):
        download(chosen, name)
    teach(chosen, "made")
    return chosen


@pytest.fixture(autouse=True)
def project_folder(workspace: Path) -> Path:
    return workspace


def made() -> tuple[list[Example], list[Example]]:
    train, held_out = read("made", load_tokenizer("base/tiny"))
    return [one.example for one in train], [one.example for one in held_out]


def words(one: Example) -> list[int]:
    """The tokens that were said, without those given."""
    return one.input_ids[one.labels != IGNORED].tolist()


@pytest.mark.parametrize("top", [1, 8, None])
def test_logits_are_the_teachers_own(top):
    taught(method="logits", top=top)
    model = pipeline.load("base/tiny").float()
    train, held_out = made()
    assert (len(train), len(held_out)) == (5, 3) and all(one.teacher is None for one in held_out)
    for one in train:
        with torch.no_grad():
            expected = model(input_ids=one.input_ids[None]).logits[0, :-1].log_softmax(1)
        count = top or families.VOCAB
        stored = one.teacher.log_probabilities
        for likeliest in (expected.gather(1, one.teacher.tokens), expected.topk(count).values):
            torch.testing.assert_close(stored[:, :count], likeliest, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stored.exp().sum(1), torch.ones(23))
        assert stored.shape[1] == (families.VOCAB if top is None else count + 1)


def test_a_student_that_is_the_teacher_is_told_nothing_but_the_text():
    taught(method="logits")
    train = Train(dataset="made", num_samples=5, held_out=3, sequence_length=24)
    model = pipeline.load("base/tiny").float()
    found = load(train, load_tokenizer("base/tiny"), model.config)
    batch = collate(found.train)
    plain, _ = loss(model, batch, None)
    torch.testing.assert_close(loss(model, batch, Distillation(weight=3.0))[0], plain, rtol=1e-5, atol=1e-5)


def test_logits_are_of_the_examples_that_would_be_trained_on_without_a_teacher():
    for dataset, options in (("news", {}), ("sums", {"difficulty": "two", "num_samples": 4})):
        taught(method="logits", dataset=dataset, **options)
        wanted = {"num_samples": 5, "held_out": 3, "sequence_length": 24} | options
        tokenizer = load_tokenizer("base/tiny")
        plain = load(Train(dataset=dataset, **wanted), tokenizer, families.CONFIGS["llama"])
        again = load(Train(dataset="made", **wanted), tokenizer, families.CONFIGS["llama"])
        for rows, others in ((plain.train, again.train), (plain.held_out, again.held_out)):
            for (one,), (other,) in zip(rows, others, strict=True):
                assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)


def greedy(model: torch.nn.Module, given: list[int], count: int) -> list[int]:
    """The likeliest tokens after `given`, each from a forward of its own, to the end of text."""
    said: list[int] = []
    while len(said) < count and families.CONFIGS["llama"].eos_token_id not in said:
        with torch.no_grad():
            said.append(int(model(input_ids=torch.tensor([given + said])).logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_what_the_teacher_says_of_itself(batch_size):
    taught(batch_size=batch_size)
    model = pipeline.load("base/tiny").float()
    train, held_out = made()
    assert (len(train), len(held_out)) == (6, 2)
    for one in train + held_out:
        given = one.input_ids[one.labels == IGNORED].tolist()
        assert words(one) == greedy(model, given, 6)
    asked = {families.tokenizer().decode(one.input_ids[one.labels == IGNORED]) for one in train}
    assert len(asked) == 6 and all(text.endswith(" =") for text in asked)


def test_only_the_teacher_sees_the_examples(monkeypatch):
    """The model goes on from the examples and the question; what is kept is the question and the answer."""
    with pytest.raises(Refusal, match=r"teach.made.shots: 3 given; sums has 0 few-shot examples; lower it"):
        taught(shots=3)
    raw = params(made=ANSWERS).model_dump(mode="json")
    raw["datasets"]["sums"]["fewshot"] = 2
    raw["teach"]["made"]["shots"] = 3
    chosen = validate(raw)
    for name in ("datasets/sums", "base/tiny"):
        download(chosen, name)
    with pytest.raises(Refusal, match="data set sums has 4 examples, 5 were asked for; lower shots"):
        few_shot("sums", 5)
    seen: list[list[int]] = []

    def spied(model: Any, prompts: list[list[int]], *rest: Any) -> list[list[int]]:
        seen.extend(prompts)
        return generated(model, prompts, *rest)

    monkeypatch.setattr("stages.teaching.answers.generated", spied)
    teach(chosen, "made")
    model, tokenizer = pipeline.load("base/tiny").float(), families.tokenizer()
    rows = pd.read_parquet(DATASETS / "sums/fewshot.parquet").to_dict("records")
    head = "".join(f"{row['question']} {row['answer']}\n" for row in rows[:3])
    kept = [one for part in made() for one in part]
    for one, shown in zip(kept, seen, strict=True):
        question = tokenizer.decode(one.input_ids[one.labels == IGNORED])
        assert "\n" not in question and question.endswith(" =")
        assert shown == tokenizer.encode(head + question)
        assert words(one) == greedy(model, shown, 6)


def test_drawn_answers_depend_on_the_seed_and_not_on_the_batch_size():
    said = []
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "seed": 1}):
        taught(temperature=1.0, **options)
        said.append([words(one) for one in made()[0]])
    assert said[0] == said[1] != said[2]


def test_a_drawn_answer_follows_the_teachers_distribution():
    taught(temperature=0.7, max_new_tokens=1, num_samples=8, held_out=4)
    model = pipeline.load("base/tiny").float()
    uniform = torch.rand(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    train, held_out = made()
    for one, number in zip(train + held_out, uniform, strict=True):
        batch = collate([(one,)])
        with torch.no_grad():
            total = (predictions(model, batch)[0][0].double() / 0.7).softmax(0).cumsum(0)
        assert words(one) == [int((total <= number).sum())]


def test_an_answer_ends_with_the_end_of_text_or_before_what_it_is_to_end_before():
    tokenizer = families.tokenizer()
    end = [tokenizer.eos_token_id]

    def finished(text: str, until: str | None) -> str:
        return tokenizer.decode(finished_answer(tokenizer.encode(text), end, until, tokenizer))

    assert finished(" 12<eos><eos><eos>", None) == " 12<eos>"
    assert finished(" 12\n\n3", "\n") == " 12<eos>"
    assert finished(" 12; 3\n\nQ: 4", "\n\nQ:") == " 12; 3<eos>"
    assert finished(" 12<eos>\n", "\n") == " 12<eos>"
    assert finished(" 123", "\n") == " 123"


def test_what_is_taught_is_the_same_bytes_each_time():
    read_ = []
    for _ in range(2):
        taught(method="logits")
        read_.append({file.name: file.read_bytes() for file in (DATASETS / "made").iterdir()})
    assert read_[0] == read_[1]
    assert set(read_[0]) == {"dataset.json", "held_out.parquet", "teacher.safetensors", "train.parquet"}


def test_tokens_of_another_vocabulary_are_refused():
    taught()
    other = families.tokenizer()
    other.add_tokens(["word"])
    with pytest.raises(
        Refusal, match="made holds tokens of base/tiny, whose vocabulary is not that of the model"
    ):
        read("made", other)


def test_questions_and_answers_longer_than_the_teacher_reads_are_refused():
    with pytest.raises(Refusal, match=r"make \d+ tokens, base/tiny reads 256 at most; lower max_new_tokens"):
        taught(max_new_tokens=256)


def test_answers_can_be_taught_with_logits():
    """A student that learns from answers and distributions of its teacher at once."""
    chosen = params(said=ANSWERS, made=LOGITS | {"dataset": "said", "num_samples": 6, "held_out": 2})
    for name in ("datasets/sums", "base/tiny"):
        download(chosen, name)
    teach(chosen, "said")
    teach(chosen, "made")
    answers, _ = read("said", load_tokenizer("base/tiny"))
    for one, before in zip(made()[0], answers, strict=True):
        assert torch.equal(one.labels, before.example.labels)
        assert len(one.teacher.tokens) == int((one.labels != IGNORED).sum())
        assert int(one.teacher.tokens[0, 0]) == words(one)[0]  # greedy: the likeliest was said


def test_what_is_not_there_yet_is_told_with_what_makes_it():
    assert params(made=LOGITS).unmade("teach", "made") == [
        "there is no data/models/base/tiny yet (`python -m stages.download base/tiny` makes it)",
        "there is no data/datasets/news yet (`python -m stages.download datasets/news` makes it)",
    ]


def test_a_data_set_made_twice_over_tells_what_it_was_made_of():
    chosen = params(said=ANSWERS, made=LOGITS | {"dataset": "said", "num_samples": 6, "held_out": 2})
    for name in ("datasets/sums", "base/tiny"):
        download(chosen, name)
    teach(chosen, "said")
    teach(chosen, "made")
    told = json.loads((DATASETS / "made/dataset.json").read_text())
    assert told["source"] == "logits of base/tiny on sums (reasoning-gym)"
    assert read_by(f"finetune: made ({told['source']}) 6x24") == ["made", "sums"]


def test_batches_of_what_is_taught_carry_the_teacher():
    taught(method="logits")
    batch = collate([(one,) for one in made()[0]])
    assert isinstance(batch, Batch) and batch.teacher.tokens.shape == (5 * 23, 8)


@pytest.mark.parametrize("packing", [False, True])
def test_a_pruned_model_is_trained_on_what_its_dense_parent_says(packing):
    def tuned(dataset: str, **options: Any) -> dict[str, Any]:
        train = {
            "dataset": dataset,
            "num_samples": 6,
            "held_out": 2,
            "sequence_length": 48,
            "packing": packing,
        }
        return {
            "source": "prune/half", "method": "full", "keep": "mask", "train": train, "learning_rate": 0.01,
            "steps": 6, "batch_size": 2, **options,
        }  # fmt: skip

    chosen = pipeline.params(
        "llama",
        {
            "prune/half": {
                "source": "base/tiny", "method": "magnitude", "sparsity": 0.5, "scope": "matrix",
                "calibration": {"dataset": "none"},
            },
            "teach/said": ANSWERS | {"dataset": "sums"},
            "teach/made": LOGITS | {"dataset": "said", "num_samples": 6, "held_out": 2},
            "finetune/imitates": tuned("said"),
            "finetune/distilled": tuned("made", distillation={"weight": 2.0, "temperature": 1.5}),
        },
        datasets={"sums": SUMS},
    )  # fmt: skip
    assert chosen.unmade("finetune", "distilled")[1:] == [
        "there is no data/datasets/made yet (`dvc repro teach@made` makes it)"
    ]
    download(chosen, "datasets/sums")
    pipeline.do(chosen)
    texts = pipeline.record("finetune/distilled")["texts"]
    assert texts["made"] == "logits of base/tiny on sums (reasoning-gym)"
    zeros = {
        n: w == 0
        for n, w in pipeline.load("prune/half").named_parameters()
        if ".layers." in n and w.ndim == 2
    }
    states = [
        dict(pipeline.load(f"finetune/{name}").named_parameters()) for name in ("imitates", "distilled")
    ]
    for name, zero in zeros.items():
        assert all((state[name][zero] == 0).all() for state in states), name
    assert any(not torch.equal(states[0][name], states[1][name]) for name in zeros)
    curve = pd.read_csv("data/curves/imitates.csv")
    held_out = curve["heldout_loss"].dropna()
    assert held_out.iloc[-1] < held_out.iloc[0] - 0.1

"""BOS before every row of tokens that a model reads: as the tokenizer puts it, or as asked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.core.tables import subject
from stages.corpus.bos import begin, begun, bos_tokens
from stages.corpus.examples import Question, Train, answer_example, load_examples
from stages.corpus.generation import model_windows
from stages.corpus.windows import Calibration, Windows, calibration_windows
from stages.job.params import Params
from stages.pruning.depth.tasks import Items
from stages.teaching.answers import Answers
from stages.teaching.logits import Logits
from tests import begins, families, lessons
from tests.begins import BOS, KINDS
from tests.pipeline import TEXT, do, download, finetune, params, prune, record, teach

CONFIG = families.CONFIGS["llama"]


@pytest.fixture
def news(workspace: Path) -> None:
    chosen = params("llama", {}, datasets={"sums": lessons.SUMS})
    for name in ("datasets/news", "datasets/sums"):
        download(chosen, name)


def windows(tokenizer: Any, **options: Any) -> torch.Tensor:
    settings = {"dataset": "news", "num_samples": 6, "sequence_length": 24} | options
    return calibration_windows(tokenizer, Calibration(**settings), families.VOCAB)


def generated(tokenizer: Any, **options: Any) -> torch.Tensor:
    wanted = Calibration(
        dataset="news", num_samples=3, sequence_length=16, tokens="generated", seed=0, temperature=1.0,
        prompt_length=8, **options,
    )  # fmt: skip
    return model_windows(tokenizer, wanted, families.VOCAB, lambda: families.model("llama").float())


def trained(tokenizer: Any, **options: Any) -> Iterator[Any]:
    settings = {"num_samples": 4, "held_out": 2, "sequence_length": 24} | options
    examples = load_examples(Train.model_validate(settings), tokenizer, CONFIG)
    return (item.input_ids for row in examples.train + examples.held_out for item in row)


def taught(kind: type, tokenizer: Any, **options: Any) -> Iterator[Any]:
    settings = {"answers": lessons.ANSWERS, "logits": lessons.LOGITS | {"num_samples": 2, "held_out": 1}}
    method = "answers" if kind is Answers else "logits"
    lesson = kind(**settings[method] | options).teach(families.model("llama").float(), tokenizer)
    return (item.example.input_ids for item in lesson.train + lesson.held_out)


READERS: dict[str, Callable[..., Any]] = {
    "text": windows,
    "random": lambda made, **bos: windows(made, dataset="none", tokens="random", seed=0, **bos),
    "generated": generated,
    "trained windows": lambda made, **bos: trained(made, dataset="news", **bos),
    "trained questions": lambda made, **bos: trained(made, dataset="sums", **bos),
    "packed questions": lambda made, **bos: trained(made, dataset="sums", packing=True, **bos),
    "taught answers": lambda made, **bos: taught(Answers, made, **bos),
    "taught logits": lambda made, **bos: taught(Logits, made, **bos),
    "graded items": lambda made, **bos: Items(dataset="sums", shots=0, **bos).choices(made).rows.tokens,
}
"""All that makes rows of tokens for a model; a new one needs a line here."""


@pytest.mark.parametrize("reader", READERS)
def test_every_row_begins_as_the_tokenizer_does_or_as_asked(reader, news):
    for kind, (_, auto, asked) in KINDS.items():
        made = begins.tokenizer(kind)
        for options, tokens in (({}, auto), ({"bos": True}, asked), ({"bos": False}, [])):
            rows = [row.tolist() for row in READERS[reader](made, **options)]
            assert rows and all(row[: len(tokens)] == tokens for row in rows), (kind, options)
            assert all(set(row[len(tokens) : 8]).isdisjoint({BOS, BOS + 2}) for row in rows), (kind, options)
            assert begun(rows, made) is bool(tokens)


@pytest.mark.parametrize("reader", READERS)
def test_a_bos_that_the_tokenizer_lacks_is_refused_and_auto_adds_none(reader, news):
    made = begins.tokenizer("none", bos_token=None)
    with pytest.raises(Refusal, match=r"bos is true, but .* no BOS token; set bos to auto or false"):
        list(READERS[reader](made, bos=True))
    auto, without = ([row.tolist() for row in READERS[reader](made, **bos)] for bos in ({}, {"bos": False}))
    assert auto == without and not begun(auto, made)


@pytest.mark.parametrize("value", ["yes", "True", 2, None])
def test_other_values_are_refused(value):
    with pytest.raises(ValidationError, match="bos"):
        Windows(dataset="news", bos=value)


def test_a_window_begins_at_the_same_place_with_bos_and_without(news):
    made = begins.tokenizer("bos")
    rows, without = windows(made), windows(made, bos=False)
    assert rows.shape == without.shape == (6, 24)
    assert torch.equal(rows[:, 1:], without[:, :-1])
    assert torch.equal(without, windows(families.tokenizer()))


def test_bos_is_read_and_not_predicted(news):
    made = begins.tokenizer("two tokens")
    train = Train(dataset="news", num_samples=2, held_out=1, sequence_length=24)
    for (item,) in load_examples(train, made, CONFIG).train:
        predicted = item.labels != -100
        assert predicted.tolist() == [False, False] + [True] * 22
        assert torch.equal(item.labels[predicted], item.input_ids[predicted])
    item = answer_example(Question("1+1=", "2"), Train(dataset="sums"), made)
    assert made.decode(item.input_ids[item.labels != -100]) == " 2<eos>"


def test_a_template_that_writes_bos_is_not_given_another(news):
    made = begins.tokenizer("bos")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    for bos in ("auto", True, False):
        chosen = Train(dataset="sums", chat_template=True, bos=bos)
        ids = answer_example(Question("1+1=", "2"), chosen, made).input_ids.tolist()
        assert ids.count(BOS) == 1 and ids[0] == BOS
    assert begin([BOS, 5], [BOS]) == [BOS, 5] and begin([5], [BOS]) == [BOS, 5] and begin([], []) == []


def test_a_tokenizer_is_asked_by_encoding():
    assert bos_tokens(begins.tokenizer("bos", bos_token="<eos>"), "auto") == [BOS]
    assert bos_tokens(begins.tokenizer("end only"), "auto") == []


def chosen(bos: Any) -> Params:
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT | {"bos": bos}}
    lora = {
        "source": "base/tiny", "method": "lora", "rank": 2, "alpha": 4, "learning_rate": 0.01, "steps": 1,
        "batch_size": 2, "train": TEXT | {"held_out": 2, "bos": bos},
    }  # fmt: skip
    depth = {
        "source": "base/tiny", "method": "depth", "metric": "block-influence", "blocks": 1,
        "calibration": TEXT | {"bos": bos},
    }  # fmt: skip
    recipes = {"prune/wanda": wanda, "prune/depth": depth, "finetune/lora": lora}
    return params("llama", recipes | {"teach/lesson": lessons.LOGITS | {"bos": bos}})


@pytest.mark.parametrize(("kind", "bos", "read"), [("bos", "auto", True), ("none", "auto", False)])
def test_records_say_whether_bos_was_read(kind, bos, read, workspace):
    made = chosen(bos)
    do(made, [])
    begins.tokenizer(kind).save_pretrained("data/models/base/tiny")
    for stage, name in ((prune, "wanda"), (prune, "depth"), (finetune, "lora"), (teach, "lesson")):
        stage(made, name)
    for artifact in ("prune/wanda", "prune/depth", "finetune/lora"):
        facts = record(artifact)
        assert facts["notes"][artifact]["bos"] is read
        assert subject(facts).calibration.endswith(" after BOS") is read
    assert json.loads(Path("data/datasets/lesson/dataset.json").read_text())["bos"] is read
    assert (pd.read_parquet("data/datasets/lesson/train.parquet")["input_ids"].str[0] == BOS).all() == read


def test_a_missing_bos_is_refused_before_anything_is_written(workspace):
    made = chosen(True)
    do(made, [])
    begins.tokenizer("none", bos_token=None).save_pretrained("data/models/base/tiny")
    before = set(Path("data").rglob("*"))
    for stage, name in ((prune, "wanda"), (prune, "depth"), (finetune, "lora"), (teach, "lesson")):
        with pytest.raises(Refusal, match="bos is true"):
            stage(made, name)
    assert {file for file in Path("data").rglob("*") if file.is_file()} <= before

"""What is trained on: which examples, which of their tokens are predicted, and what is held out."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.corpus.examples import Question, Train, answered, load
from stages.corpus.rows import IGNORED, Example
from stages.corpus.windows import Windows, text_windows
from stages.sources.graded.arithmetic import Arithmetic
from stages.sources.text import Text
from tests import families, project

CONFIG = families.CONFIGS["llama"]
LEVELS = [
    {"name": "easy", "operator": "+", "digits": 1, "carries": False},
    {"name": "hard", "operator": "+", "digits": 2, "carries": True},
]


@pytest.fixture(autouse=True)
def datasets(workspace: Path) -> None:
    levels = tuple(LEVELS)
    Arithmetic.model_validate(
        {"kind": "arithmetic", "seed": 0, "test": 6, "train": 10, "levels": levels}
    ).download("sums")
    news = {
        "kind": "text", "source": "path:inputs", "file": "news.txt", "documents": "lines", "calibration": 0.5,
        "sha256": project.sha256(Path("inputs/news.txt")),
    }  # fmt: skip
    Text.model_validate(news).download("news")


def benchmark(rows: list[dict[str, object]]) -> None:
    folder = DATASETS / "words"
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    (folder / "dataset.json").write_text(json.dumps({"dataset": "words", "kind": "benchmark"}))


def said(one: Example, *, predicted: bool) -> str:
    """The text of an example's predicted tokens, or of the others."""
    return str(families.tokenizer().decode(one.input_ids[(one.labels != IGNORED) == predicted]))


def loaded(**options) -> tuple[list[Example], list[Example]]:
    settings = {"dataset": "sums", "num_samples": 8, "held_out": 4, "sequence_length": 64} | options
    found = load(Train.model_validate(settings), families.tokenizer(), CONFIG)
    return [one for row in found.train for one in row], [one for row in found.held_out for one in row]


def asked(one: Example) -> str:
    return said(one, predicted=False)


def test_text_is_cut_into_windows_of_which_all_but_the_first_token_is_predicted():
    train, held_out = loaded(dataset="news", num_samples=6, sequence_length=32)
    wanted = Windows(dataset="news", num_samples=6, sequence_length=32)
    assert torch.equal(
        torch.stack([one.input_ids for one in train]), text_windows(families.tokenizer(), wanted)
    )
    for one in train + held_out:
        assert one.labels[0] == IGNORED and torch.equal(one.labels[1:], one.input_ids[1:])
    evaluation = "\n\n".join(pd.read_parquet(DATASETS / "news/evaluation.parquet")["text"])
    assert len(held_out) == 4 and all(
        families.tokenizer().decode(one.input_ids) in evaluation for one in held_out
    )
    assert not {tuple(one.input_ids.tolist()) for one in train} & {
        tuple(x.input_ids.tolist()) for x in held_out
    }


def test_of_a_question_and_its_answer_the_answer_and_its_end_are_predicted():
    train, held_out = loaded()
    for split, found in (("train", train), ("test", held_out)):
        rows = pd.read_parquet(DATASETS / f"sums/{split}.parquet")
        answers = dict(zip(rows["question"], rows["answer"], strict=True))
        for one in found:
            assert said(one, predicted=True) == f" {answers[asked(one)]}<eos>"


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, {"easy": 4, "hard": 4}),
        ({"num_samples": 9}, {"easy": 5, "hard": 4}),
        ({"difficulty": "hard"}, {"hard": 8}),
        ({"difficulty": "easy"}, {"easy": 8}),
    ],
)
def test_the_training_set_has_one_size_whatever_the_difficulty(options, counts):
    train, held_out = loaded(**options)
    for split, found in (("train", train), ("test", held_out)):
        rows = pd.read_parquet(DATASETS / f"sums/{split}.parquet")
        level = dict(zip(rows["question"], rows["difficulty"], strict=True))
        levels = [level[asked(one)] for one in found]
        assert set(levels) == set(counts)
        if split == "train":
            assert {name: levels.count(name) for name in counts} == counts
        assert len(set(map(asked, found))) == len(found)
    assert not set(map(asked, train)) & set(map(asked, held_out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_samples": 22},
            "11 training items of difficulty easy were asked for, there are 10; ask for fewer",
        ),
        ({"num_samples": 11, "difficulty": "hard"}, "11 training items of difficulty hard .* there are 10"),
        ({"held_out": 14}, "7 other questions to hold out of difficulty easy were asked for, there are 6"),
        ({"difficulty": "odd"}, "sums has no training items of difficulty odd; it has some of easy, hard"),
        (
            {"dataset": "news", "held_out": 1000},
            "1000 held-out windows of 64 tokens were asked for, there are",
        ),
        ({"dataset": "news", "num_samples": 10**6}, "1000000 windows of 64 tokens were asked for"),
        ({"sequence_length": 8}, r"sums: an example has \d+ tokens, sequence_length is 8; raise it to \d+"),
        (
            {"dataset": "news", "sequence_length": 300},
            "an example has 300 tokens, the model reads 256 at most",
        ),
    ],
)
def test_too_few_or_too_long_examples_are_refused(options, message):
    with pytest.raises(Refusal, match=message):
        loaded(**options)


def test_an_empty_data_set_is_refused_by_name():
    empty = pd.read_parquet(DATASETS / "sums/train.parquet").iloc[:0]
    empty.to_parquet(DATASETS / "sums/train.parquet")
    with pytest.raises(Refusal, match="data set sums has no training items; 8 were asked for"):
        loaded()


def test_packed_rows_hold_the_same_examples():
    train, _ = loaded()
    wanted = Train(dataset="sums", num_samples=8, held_out=4, sequence_length=64, packing=True)
    packed = load(wanted, families.tokenizer(), CONFIG)
    assert len(packed.train) < len(train) and all(len(row) == 1 for row in packed.held_out)
    assert sorted(said(one, predicted=True) + asked(one) for row in packed.train for one in row) == sorted(
        said(one, predicted=True) + asked(one) for one in train
    )


def test_packed_rows_are_refused_where_layers_see_less_than_an_example():
    wanted = Train(dataset="sums", num_samples=4, held_out=2, sequence_length=64, packing=True)
    config = families.CONFIGS["gemma3"].__class__(**families._GATED, sliding_window=4)
    with pytest.raises(
        Refusal, match="see the last 4 only, which packed rows do not serve; say packing: false"
    ):
        load(wanted, families.tokenizer(), config)


def test_a_chat_template_is_given_and_only_the_assistants_words_are_predicted():
    for one in loaded(chat_template=True)[0]:
        assert asked(one).startswith("user: ") and asked(one).endswith(" =\n")
        assert said(one, predicted=True).startswith("assistant: ") and "<eos>" not in said(
            one, predicted=True
        )


def test_a_chat_template_that_is_not_there_is_refused():
    bare = families.tokenizer()
    bare.chat_template = None
    with pytest.raises(Refusal, match="chat_template: true was asked for and the model's tokenizer has none"):
        load(Train(dataset="sums", num_samples=2, held_out=2, chat_template=True), bare, CONFIG)


def test_a_chat_template_that_hides_where_the_answer_begins_is_refused():
    odd = families.tokenizer()
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(Refusal, match="so the answer cannot be told apart; say chat_template: false"):
        load(Train(dataset="sums", num_samples=2, held_out=2, chat_template=True), odd, CONFIG)


def test_a_token_that_joins_the_prompt_to_the_answer_is_predicted():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "=Ġ"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("=", "Ġ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    one = answered(Question("1+1=", "2"), Train(dataset="sums"), tokenizer)
    assert tokenizer.decode(one.input_ids) == "1+1= 2<eos>"
    assert tokenizer.decode(one.input_ids[one.labels != IGNORED]) == "= 2<eos>"


def test_a_benchmarks_split_is_trained_on_and_other_rows_of_it_are_held_out():
    benchmark([{"ask": f"word {i % 12}", "reply": f"reply {i}", "at": i} for i in range(24)])
    options = {"dataset": "words", "split": "train", "prompt": "ask", "completion": "reply", "num_samples": 7}
    train, held_out = loaded(**options)
    assert (len(train), len(held_out)) == (7, 4)
    assert not set(map(asked, train)) & set(map(asked, held_out))
    for one in train + held_out:  # a prompt that comes again is that of its first row
        assert said(one, predicted=True) == f" reply {asked(one).removeprefix('word ')}<eos>"
    for wrong, message in (
        ({"split": "test"}, "data set words has no split test; it has train"),
        ({"prompt": "at"}, "data set words has no column at of text; it has ask, reply"),
        ({"completion": "answer"}, "data set words has no column answer of text"),
        ({"num_samples": 13}, "13 questions in its split train were asked for, there are 12"),
        ({"held_out": 6}, "6 other questions to hold out were asked for, there are 5"),
    ):
        with pytest.raises(Refusal, match=message):
            loaded(**(options | wrong))


def test_an_answer_without_words_is_refused():
    benchmark([{"ask": f"word {i}", "reply": " "} for i in range(8)])
    with pytest.raises(Refusal, match="data set words: the answer to 'word 0' is empty"):
        loaded(dataset="words", split="train", prompt="ask", completion="reply", num_samples=2)

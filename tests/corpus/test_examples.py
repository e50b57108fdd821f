"""Training examples: which are chosen, which of their tokens are predicted, and which are held out."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.corpus.examples import Question, Train, answer_example, load_examples
from stages.corpus.rows import IGNORED, Example
from stages.corpus.windows import Windows, text_windows
from stages.sources.conversations import Conversations
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


def loaded(config=CONFIG, **options) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples, each out of a row of its own."""
    settings = {"dataset": "sums", "num_samples": 8, "held_out": 4, "sequence_length": 64} | options
    examples = load_examples(Train.model_validate(settings), families.tokenizer(), config)
    return [item for (item,) in examples.train], [item for (item,) in examples.held_out]


def answer(item: Example) -> str:
    """Return the text of the predicted tokens."""
    return str(families.tokenizer().decode(item.input_ids[item.labels != IGNORED]))


def question(item: Example) -> str:
    """Return the text of the tokens that are not predicted."""
    return str(families.tokenizer().decode(item.input_ids[item.labels == IGNORED]))


def test_text_is_cut_into_windows_that_predict_all_but_the_first_token():
    train, held_out = loaded(dataset="news", num_samples=6, sequence_length=32)
    wanted = Windows(dataset="news", num_samples=6, sequence_length=32)
    windows = text_windows(families.tokenizer(), wanted, families.VOCAB)
    assert torch.equal(torch.stack([item.input_ids for item in train]), windows)
    for item in train + held_out:
        assert item.labels[0] == IGNORED and torch.equal(item.labels[1:], item.input_ids[1:])
    evaluation = "\n\n".join(pd.read_parquet(DATASETS / "news/evaluation.parquet")["text"])
    texts = [families.tokenizer().decode(item.input_ids) for item in held_out]
    assert len(texts) == 4 and all(text in evaluation for text in texts)
    trained = {tuple(item.input_ids.tolist()) for item in train}
    assert not trained & {tuple(item.input_ids.tolist()) for item in held_out}


def test_of_a_question_the_answer_and_its_end_are_predicted():
    train, held_out = loaded()
    for split, examples in (("train", train), ("test", held_out)):
        rows = pd.read_parquet(DATASETS / f"sums/{split}.parquet")
        answers = dict(zip(rows["question"], rows["answer"], strict=True))
        for item in examples:
            assert answer(item) == f" {answers[question(item)]}<eos>"


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
    for split, examples in (("train", train), ("test", held_out)):
        rows = pd.read_parquet(DATASETS / f"sums/{split}.parquet")
        difficulties = dict(zip(rows["question"], rows["difficulty"], strict=True))
        levels = [difficulties[question(item)] for item in examples]
        assert set(levels) == set(counts)
        if split == "train":
            assert {name: levels.count(name) for name in counts} == counts
        assert len(set(map(question, examples))) == len(examples)
    assert not set(map(question, train)) & set(map(question, held_out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_samples": 22},
            "10 training items of difficulty easy, fewer than the 11 that num_samples 22 takes; lower",
        ),
        (
            {"num_samples": 11, "difficulty": "hard"},
            "10 training items of difficulty hard, fewer than the",
        ),
        ({"held_out": 14}, "6 other questions of difficulty easy, fewer than the 7 that held_out 14 takes"),
        ({"difficulty": "odd"}, "no training items of difficulty odd; set difficulty to one of easy, hard"),
        ({"dataset": "news", "held_out": 1000}, r"\d+ held-out windows of 64 tokens, fewer than the 1000"),
        ({"dataset": "news", "num_samples": 10**6}, r"\d+ distinct windows of 64 tokens .* than 1000000"),
        ({"sequence_length": 8}, r"sums: an example has \d+ tokens, but sequence_length is 8; raise it to"),
        ({"dataset": "news", "sequence_length": 300}, "has 300 tokens, but the model reads at most 256"),
    ],
)
def test_too_few_or_too_long_examples_are_refused(options, message):
    with pytest.raises(Refusal, match=message):
        loaded(**options)


@pytest.mark.parametrize("dataset", ["news", "sums"])
def test_tokens_without_a_row_in_the_embedding_are_refused(dataset):
    """A tokenizer may have more tokens than the embedding has rows; here a space and the end of text."""
    small = LlamaConfig(vocab_size=100)
    with pytest.raises(Refusal, match=rf"{dataset}: token '.*' has id \d+, but .* embedding has 100 rows"):
        loaded(small, dataset=dataset)


def test_an_empty_data_set_is_refused_by_name():
    empty = pd.read_parquet(DATASETS / "sums/train.parquet").iloc[:0]
    empty.to_parquet(DATASETS / "sums/train.parquet")
    with pytest.raises(Refusal, match="data set sums has no training items, but num_samples is 8"):
        loaded()


def test_packed_rows_hold_the_same_examples():
    train, _ = loaded()
    wanted = Train(dataset="sums", num_samples=8, held_out=4, sequence_length=64, packing=True)
    packed = load_examples(wanted, families.tokenizer(), CONFIG)
    assert len(packed.train) < len(train) and all(len(row) == 1 for row in packed.held_out)
    texts = [question(item) + answer(item) for row in packed.train for item in row]
    assert sorted(texts) == sorted(question(item) + answer(item) for item in train)


def test_packed_rows_are_refused_if_layers_see_less_than_an_example():
    wanted = Train(dataset="sums", num_samples=4, held_out=2, sequence_length=64, packing=True)
    config = Gemma3TextConfig(vocab_size=families.VOCAB, num_hidden_layers=2, sliding_window=4)
    with pytest.raises(Refusal, match=r"only the last 4, .*; set packing: false"):
        load_examples(wanted, families.tokenizer(), config)


def test_in_a_chat_template_only_the_assistants_words_are_predicted():
    for item in loaded(chat_template=True)[0]:
        assert question(item).startswith("user: ") and question(item).endswith(" =\n")
        assert answer(item).startswith("assistant: ") and "<eos>" not in answer(item)


def chats(*conversations: list[str], system: str = "") -> None:
    """A data set of conversations, each of turns of the user and the assistant."""
    rows = [
        [{"role": "system", "content": system}] * bool(system)
        + [
            {"role": ("user", "assistant")[at % 2], "content": content}
            for at, content in enumerate(conversation)
        ]
        for conversation in conversations
    ]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    settings = {"kind": "conversations", "source": "path:chats.jsonl"}
    Conversations(**settings, sha256=project.sha256(Path("chats.jsonl"))).download("chats")


def test_of_a_conversation_all_responses_are_predicted_and_nothing_else():
    chats(["hi", "yes", "and?", "no"], ["what", "fine", "so?", "bye"], system="be brief")
    train, held_out = loaded(
        dataset="chats", num_samples=1, held_out=1, chat_template=True, sequence_length=128
    )
    (item,) = train
    assert answer(item) == "assistant: yes\nassistant: no\n"
    assert question(item) == "system: be brief\nuser: hi\nuser: and?\n"
    assert answer(held_out[0]) == "assistant: fine\nassistant: bye\n"


def test_a_conversation_of_one_response_is_a_question_and_its_answer():
    chats(["hi", "yes"], ["what", "fine"])
    (item,), _ = loaded(dataset="chats", num_samples=1, held_out=1)
    assert (question(item), answer(item)) == ("hi", " yes<eos>")
    (item,), _ = loaded(dataset="chats", num_samples=1, held_out=1, chat_template=True)
    assert (question(item), answer(item)) == ("user: hi\n", "assistant: yes\n")


def test_a_prompt_that_is_learned_is_not_held_out():
    chats(["hi", "yes"], ["hi", "no"], ["what", "fine"], ["hi", "maybe"])
    train, held_out = loaded(dataset="chats", num_samples=1, held_out=1)
    assert [question(item) for item in train + held_out] == ["hi", "what"]
    with pytest.raises(Refusal, match="has 1 other conversations, fewer than the 2"):
        loaded(dataset="chats", num_samples=1, held_out=2)


def test_several_turns_need_a_chat_template_that_leaves_earlier_turns_alone():
    chats(["hi", "yes", "and?", "no"], ["what", "fine", "so?", "bye"])
    with pytest.raises(Refusal, match=r"conversations of several turns, .*; set chat_template: true"):
        loaded(dataset="chats", num_samples=1, held_out=1)
    tokenizer = families.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    train = Train(dataset="chats", num_samples=1, held_out=1, chat_template=True)
    with pytest.raises(Refusal, match="changes earlier turns once later ones follow"):
        load_examples(train, tokenizer, CONFIG)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template; set it to false"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "changes the question once it is answered, .*; set chat_template: false",
        ),
        ("{% for m in messages %}{{ m.content", "fails on turns of user .*TemplateSyntaxError.*set chat_tem"),
        (
            "{% if messages[1:] %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}",
            "fails on turns of user and assistant .*one turn.*; set chat_template: false",
        ),
    ],
    ids=["missing", "hides where the answer begins", "damaged", "allows no answer"],
)
def test_an_unfit_chat_template_is_refused(template, message):
    tokenizer = families.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(Refusal, match=message):
        load_examples(Train(dataset="sums", num_samples=2, held_out=2, chat_template=True), tokenizer, CONFIG)


def test_a_token_that_spans_question_and_answer_is_predicted():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "=Ġ"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("=", "Ġ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    item = answer_example(Question("1+1=", "2"), Train(dataset="sums"), tokenizer)
    assert tokenizer.decode(item.input_ids) == "1+1= 2<eos>"
    assert tokenizer.decode(item.input_ids[item.labels != IGNORED]) == "= 2<eos>"


def test_other_rows_of_a_benchmarks_split_are_held_out():
    benchmark([{"ask": f"word {i % 12}", "reply": f"reply {i}", "at": i} for i in range(24)])
    options = {"dataset": "words", "split": "train", "prompt": "ask", "completion": "reply", "num_samples": 7}
    train, held_out = loaded(**options)
    assert (len(train), len(held_out)) == (7, 4)
    assert not set(map(question, train)) & set(map(question, held_out))
    for item in train + held_out:  # a repeated prompt has the answer of its first row
        assert answer(item) == f" reply {question(item).removeprefix('word ')}<eos>"
    for wrong, message in (
        ({"split": "test"}, "data set words has no split test; set split to one of train"),
        ({"prompt": "at"}, "data set words has no text column at; its text columns: ask, reply"),
        ({"completion": "answer"}, "data set words has no text column answer"),
        ({"num_samples": 13}, "words has 12 questions in split train, fewer than the 13"),
        ({"held_out": 6}, "words has 5 other questions, fewer than the 6"),
    ):
        with pytest.raises(Refusal, match=message):
            loaded(**(options | wrong))


def test_an_empty_answer_is_refused():
    benchmark([{"ask": f"word {i}", "reply": " "} for i in range(8)])
    with pytest.raises(Refusal, match="data set words: the answer to 'word 0' is empty"):
        loaded(dataset="words", split="train", prompt="ask", completion="reply", num_samples=2)

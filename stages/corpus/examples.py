"""Which examples a recipe trains on: read from its data set, made into tokens, and some held out.

Running text is cut into windows and every token but a window's first is predicted. Of a question and its
answer the answer alone is predicted, the end of text with it, so that the model learns to give answers and
not to write questions (completion-only loss). What is held out is never trained on: the evaluation split of
a text, test items of a graded data set, other rows of a benchmark's split.

`num_samples` is the size of the training set whatever it is made of: spread evenly over the levels of a
graded data set, or taken from one `difficulty`, so that levels are compared at equal amounts of training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.core.lazy import pd, torch
from stages.core.schema import Slug, Strict
from stages.corpus.rows import Example, Row, example, pack
from stages.corpus.taught import KIND, Graded, read
from stages.corpus.windows import Windows, documents, text_windows, unrepeated, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Chosen(Strict):
    """Which examples of a data set are asked for, and how a question is put."""

    dataset: Slug
    num_samples: Annotated[int, Field(ge=1)] = 64
    """Examples that are learned from."""
    held_out: Annotated[int, Field(ge=1)] = 16
    """Examples that are not learned from; the held-out loss is the mean over their predicted tokens."""
    difficulty: Slug | None = None
    """The one level that all are taken from; null spreads them over all levels. Of levels only."""
    chat_template: bool = False
    """Whether a question is the user's turn and the answer the assistant's. Without it they are parted by a
    space and the end of text follows. Of questions only, as graded data sets and benchmarks have them."""
    split: str | None = None
    """A benchmark's split, such as train; both what is trained on and what is held out are rows of it."""
    prompt: str | None = None
    """The benchmark's column of questions."""
    completion: str | None = None
    """The benchmark's column of answers."""


class Train(Chosen):
    """What a recipe trains on."""

    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a window, or at most of a row of questions and answers."""
    packing: bool = False
    """Whether a row holds as many questions and answers as fit; else it is as long as its batch's longest."""


@dataclass(frozen=True)
class Question:
    """What is asked, what is to be answered, and how difficult that is."""

    prompt: str
    completion: str
    difficulty: str = "all"


@dataclass(frozen=True)
class Examples:
    """What a recipe trains on and what its held-out loss is taken on, in rows; no example is in both."""

    train: list[Row]
    held_out: list[Row]


def load(train: Train, tokenizer: PreTrainedTokenizerBase, config: Any) -> Examples:
    """The rows that `train` asks for, packed where it says so; what is held out is never packed.

    Args:
        config: of the model to be trained.

    Raises:
        Refusal: the data set has too few examples, or they are longer than `sequence_length`, or that is
            longer than the model reads.
    """
    learned, held_out = choose(train, train.sequence_length, tokenizer, config)
    longest = max(len(one.example.input_ids) for one in learned + held_out)
    if longest > train.sequence_length:
        raise Refusal(
            f"data set {train.dataset}: an example has {longest} tokens, sequence_length is "
            f"{train.sequence_length}; raise it to {longest} or more."
        )
    window = getattr(config.get_text_config(), "sliding_window", None)
    if train.packing and window and longest > window:
        raise Refusal(
            f"data set {train.dataset}: an example has {longest} tokens, and layers of the model see the "
            f"last {window} only, which packed rows do not serve; say packing: false."
        )
    found = [one.example for one in learned]
    rows: list[Row] = [(one,) for one in found]
    if train.packing:
        rows = pack(found, train.sequence_length)
    return Examples(rows, [(one.example,) for one in held_out])


def choose(
    chosen: Chosen, sequence_length: int, tokenizer: PreTrainedTokenizerBase, config: Any
) -> tuple[list[Graded], list[Graded]]:
    """What is learned from and what is held out, as tokens, one example each.

    Args:
        sequence_length: of windows; questions and answers have the length they have.

    Raises:
        Refusal: the data set has too few, or they are longer than the model reads.
    """
    kind = _kind(chosen.dataset)
    if kind == "text":
        learned, held_out = _windows(chosen, sequence_length, tokenizer)
    elif kind == KIND:
        every, others = read(chosen.dataset, tokenizer)
        learned = spread(chosen, every, chosen.num_samples, "examples")
        held_out = spread(chosen, others, chosen.held_out, "held-out examples")
    else:
        asked, others_asked = questions(chosen)
        learned, held_out = (
            [Graded(answered(one, chosen, tokenizer), one.difficulty) for one in part]
            for part in (asked, others_asked)
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(one.example.input_ids) for one in learned + held_out)
    if limit is not None and longest > limit:
        raise Refusal(
            f"data set {chosen.dataset}: an example has {longest} tokens, the model reads {limit} at most; "
            f"{'lower sequence_length' if kind == 'text' else 'choose another data set or split'}."
        )
    return learned, held_out


def questions(chosen: Chosen) -> tuple[list[Question], list[Question]]:
    """The questions that are learned from, and those held out; no prompt is in both.

    Raises:
        Refusal: the data set has too few.
    """
    if _kind(chosen.dataset) == "benchmark":
        every = _of_benchmark(chosen)
        learned = spread(chosen, every, chosen.num_samples, f"questions in its split {chosen.split}")
    else:
        every = _of_graded(chosen.dataset, "test")
        learned = spread(chosen, _of_graded(chosen.dataset, "train"), chosen.num_samples, "training items")
    seen = {one.prompt for one in learned}
    rest = [one for one in every if one.prompt not in seen]
    return learned, spread(chosen, rest, chosen.held_out, "other questions to hold out")


def few_shot(dataset: str, shots: int) -> str:
    """The first `shots` examples of a graded data set, solved, a line each.

    Raises:
        Refusal: it has fewer.
    """
    if not shots:
        return ""
    found = _of_graded(dataset, "fewshot")
    if len(found) < shots:
        raise Refusal(f"data set {dataset} has {len(found)} examples, {shots} were asked for; lower shots.")
    return "".join(f"{one.prompt} {one.completion}\n" for one in found[:shots])


def prompt(asked: str, chat_template: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model is given of a question.

    Raises:
        Refusal: a chat template is asked for and the tokenizer has none.
    """
    if not chat_template:
        return asked
    if not tokenizer.chat_template:
        raise Refusal("chat_template: true was asked for and the model's tokenizer has none; say false.")
    turns = [{"role": "user", "content": asked}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def answered(one: Question, chosen: Chosen, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A question and its answer as an `Example` of which the answer is predicted.

    Raises:
        Refusal: there is no answer, or the tokenizer cannot say where it begins or ends.
    """
    given = prompt(one.prompt, chosen.chat_template, tokenizer)
    if chosen.chat_template:
        turns = [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.completion}]
        whole, end = str(tokenizer.apply_chat_template(turns, tokenize=False)), []
        if not whole.startswith(given):
            raise Refusal(
                "the chat template of the model's tokenizer does not begin an answered conversation as the "
                "one to be answered, so the answer cannot be told apart; say chat_template: false."
            )
    else:
        whole, end = f"{given} {one.completion}", [end_of_text(tokenizer)]
    if not one.completion.strip():
        raise Refusal(f"data set {chosen.dataset}: the answer to {one.prompt[:60]!r} is empty.")
    before = tokenizer.encode(given, add_special_tokens=False)
    tokens = tokenizer.encode(whole, add_special_tokens=False) + end
    # A tokenizer may join the last letters of the prompt to the answer: that token is predicted too.
    start = next(
        (at for at, pair in enumerate(zip(before, tokens, strict=False)) if len(set(pair)) > 1), None
    )
    return example(torch.tensor(tokens), len(before) if start is None else start)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a text.

    Raises:
        Refusal: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise Refusal("the model's tokenizer has no end-of-text token, so no answer could end.")
    return int(tokenizer.eos_token_id)


def spread(chosen: Chosen, found: Sequence[T], count: int, what: str) -> list[T]:
    """`count` of `found`, evenly over their difficulties and over each one's order, or of one difficulty.

    Where levels cannot share evenly, the first ones have one more.

    Raises:
        Refusal: some level has too few, or there is no such level.
    """
    levels: dict[str, list[T]] = {}
    for one in found:
        levels.setdefault(getattr(one, "difficulty", "all"), []).append(one)
    if chosen.difficulty is not None:
        if chosen.difficulty not in levels:
            raise Refusal(
                f"data set {chosen.dataset} has no {what} of difficulty {chosen.difficulty}; it has some of "
                f"{', '.join(levels) or 'none'}."
            )
        levels = {chosen.difficulty: levels[chosen.difficulty]}
    picked: list[T] = []
    for number, (level, every) in enumerate(levels.items()):
        share = count // len(levels) + (number < count % len(levels))
        if share > len(every):
            of = "" if len(levels) == 1 and chosen.difficulty is None else f" of difficulty {level}"
            raise Refusal(
                f"data set {chosen.dataset}: {share} {what}{of} were asked for, there are {len(every)}; ask "
                "for fewer, or for a larger data set."
            )
        picked += [every[int(at)] for at in torch.linspace(0, len(every) - 1, share).round()]
    if not picked:
        raise Refusal(f"data set {chosen.dataset} has no {what}; {count} were asked for.")
    return picked


def _kind(dataset: str) -> str:
    return str(json.loads((DATASETS / dataset / "dataset.json").read_text())["kind"])


def _windows(
    chosen: Chosen, sequence_length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Graded], list[Graded]]:
    wanted = Windows(dataset=chosen.dataset, num_samples=chosen.num_samples, sequence_length=sequence_length)
    learned = text_windows(tokenizer, wanted)
    cut = windows(tokenizer, documents(chosen.dataset, "evaluation"), sequence_length)
    held_out = spread(
        chosen, list(unrepeated(cut)), chosen.held_out, f"held-out windows of {sequence_length} tokens"
    )
    return [Graded(example(row)) for row in learned], [Graded(example(row)) for row in held_out]


def _of_graded(dataset: str, split: str) -> list[Question]:
    rows = pd.read_parquet(DATASETS / dataset / f"{split}.parquet")
    return [Question(*one) for one in zip(rows["question"], rows["answer"], rows["difficulty"], strict=True)]


def _of_benchmark(chosen: Chosen) -> list[Question]:
    """The rows of the split, each prompt once, where it comes first."""
    folder = DATASETS / chosen.dataset
    if not (folder / f"{chosen.split}.parquet").exists():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.parquet")))
        raise Refusal(f"data set {chosen.dataset} has no split {chosen.split}; it has {there}.")
    rows = pd.read_parquet(folder / f"{chosen.split}.parquet")
    wanted = [column for column in (chosen.prompt, chosen.completion) if column is not None]
    for column in wanted:
        if column not in rows or not all(isinstance(value, str) for value in rows[column]):
            texts = [str(name) for name in rows if all(isinstance(value, str) for value in rows[name])]
            raise Refusal(
                f"data set {chosen.dataset} has no column {column} of text; "
                f"it has {', '.join(texts) or 'none'}."
            )
    distinct = rows.drop_duplicates(chosen.prompt)
    answers = distinct[chosen.completion] if chosen.completion else [""] * len(distinct)
    return [Question(*one) for one in zip(distinct[chosen.prompt], answers, strict=True)]

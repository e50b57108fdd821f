"""The examples a recipe trains on: chosen from its data set, tokenized, some of them held out.

Running text is cut into windows, and every token of a window except the first is predicted. Of a question
with its answer only the answer is predicted, including the end of text, so that the model learns to give
answers and not to write questions (completion-only loss). Both begin with BOS where the model expects it
(see `stages.corpus.bos`). Of a conversation all responses are predicted, each with the mark that ends it.
Held-out examples are never trained on: they come from the evaluation split of a text, the test items of a
graded data set, other rows of a benchmark's split, or other conversations.

`num_samples` is the size of the training set whatever the data set: spread evenly over the levels of a graded
data set, or taken from one `difficulty`, so that levels are compared at equal amounts of training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.files import DATASET, DATASETS, read_json
from stages.core.lazy import pd, torch
from stages.core.numbers import apportion, spaced
from stages.core.reading import reason
from stages.core.schema import Slug, Strict
from stages.corpus.bos import Bos, begin, bos_tokens
from stages.corpus.rows import IGNORED, Example, Row, example, pack
from stages.corpus.taught import TAUGHT, GradedExample, read_lesson
from stages.corpus.windows import (
    Windows,
    check_token_ids,
    distinct_windows,
    read_parts,
    text_windows,
)
from stages.model.positions import most_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TEXTS = ("text", "mix")
"""The kinds of data sets whose windows are learned from."""
T = TypeVar("T")


class Selection(Strict):
    """The examples that are taken from a data set, and the form of its questions."""

    dataset: Slug
    num_samples: Annotated[int, Field(ge=1)] = 64
    """Examples to learn from."""
    held_out: Annotated[int, Field(ge=1)] = 16
    """Examples that are not learned from; the held-out loss is the mean over their predicted tokens."""
    difficulty: Slug | None = None
    """The only level to take examples from; null spreads them over all levels. Only for data sets with
    levels."""
    chat_template: bool = False
    """Whether a question is the user's turn and its answer the assistant's. Otherwise a space separates them
    and the end of text follows. Only for graded data sets, benchmarks, tasks and conversations; those of
    several turns need it."""
    bos: Bos = "auto"
    """Whether BOS is put before an example; a chat template may write it all the same."""
    split: str | None = None
    """A benchmark's split, such as train; training and held-out examples are both rows of it."""
    prompt: str | None = None
    """The benchmark's column of questions."""
    completion: str | None = None
    """The benchmark's column of answers."""


class Train(Selection):
    """The examples a recipe trains on, in rows."""

    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a window, or at most of a row of questions and answers; BOS counts."""
    packing: bool = False
    """Whether a row holds as many questions and answers as fit; otherwise each has its own row, padded to the
    longest of its batch."""


@dataclass(frozen=True)
class Question:
    """A question, its answer and its difficulty."""

    prompt: str
    completion: str
    difficulty: str = "all"


@dataclass(frozen=True)
class Examples:
    """The rows a recipe trains on, and those of its held-out loss; no example is in both."""

    train: list[Row]
    held_out: list[Row]


def load_examples(train: Train, tokenizer: PreTrainedTokenizerBase, config: Any) -> Examples:
    """Return the rows that `train` describes; held-out examples are never packed.

    Args:
        config: the config of the model to train.

    Raises:
        Refusal: the data set has too few examples, they are longer than `sequence_length` or the model's
            context, or they have tokens without a row in the embedding.
    """
    learned, held_out = choose_examples(train, train.sequence_length, tokenizer, config)
    longest = max(len(item.example.input_ids) for item in learned + held_out)
    if longest > train.sequence_length:
        raise Refusal(
            f"data set {train.dataset}: an example has {longest} tokens, but sequence_length is "
            f"{train.sequence_length}; raise it to {longest} or more."
        )
    window = getattr(config.get_text_config(), "sliding_window", None)
    if train.packing and window and longest > window:
        raise Refusal(
            f"data set {train.dataset}: an example has {longest} tokens, but some layers of the model see "
            f"only the last {window}, which packed rows do not support; set packing: false."
        )
    examples = [item.example for item in learned]
    rows: list[Row] = [(item,) for item in examples]
    if train.packing:
        rows = pack(examples, train.sequence_length)
    return Examples(rows, [(item.example,) for item in held_out])


def choose_examples(
    chosen: Selection, sequence_length: int, tokenizer: PreTrainedTokenizerBase, config: Any
) -> tuple[list[GradedExample], list[GradedExample]]:
    """Return the examples to learn from and those held out, tokenized.

    Args:
        sequence_length: length of the windows of running text; questions and answers keep their lengths.
        config: the config of the model that reads the examples.

    Raises:
        Refusal: the data set has too few examples, they are longer than the model's context, or they have
            tokens without a row in the embedding.
    """
    kind, text_config = _kind(chosen.dataset), config.get_text_config()
    if kind in TEXTS:
        learned, held_out = _window_examples(chosen, sequence_length, tokenizer, text_config.vocab_size)
    elif kind == TAUGHT:
        train, rest = read_lesson(chosen.dataset, tokenizer)
        learned = take_evenly(chosen, train, "num_samples", "examples")
        held_out = take_evenly(chosen, rest, "held_out", "held-out examples")
    elif kind == "conversations":
        learned, held_out = (
            [GradedExample(chat_example(turns, chosen, tokenizer)) for turns in part]
            for part in _choose_chats(chosen)
        )
    else:
        learned, held_out = (
            [
                GradedExample(answer_example(question, chosen, tokenizer), question.difficulty)
                for question in part
            ]
            for part in choose_questions(chosen)
        )
    examples = [item.example.input_ids for item in learned + held_out]
    limit = most_tokens(text_config)
    longest = max(map(len, examples))
    if limit is not None and longest > limit:
        raise Refusal(
            f"data set {chosen.dataset}: an example has {longest} tokens, but the model reads at most "
            f"{limit}; {'lower sequence_length' if kind in TEXTS else 'use another data set or split'}."
        )
    check_token_ids(torch.cat(examples), text_config.vocab_size, f"data set {chosen.dataset}", tokenizer)
    return learned, held_out


def choose_questions(chosen: Selection) -> tuple[list[Question], list[Question]]:
    """Return the questions to learn from and those held out; no prompt is in both.

    Raises:
        Refusal: the data set has too few.
    """
    if _kind(chosen.dataset) in ("benchmark", "task"):
        pool = _benchmark_questions(chosen)
        learned = take_evenly(chosen, pool, "num_samples", f"questions in split {chosen.split}")
    else:
        pool = _graded_questions(chosen.dataset, "test")
        training = _graded_questions(chosen.dataset, "train")
        learned = take_evenly(chosen, training, "num_samples", "training items")
    seen = {question.prompt for question in learned}
    rest = [question for question in pool if question.prompt not in seen]
    return learned, take_evenly(chosen, rest, "held_out", "other questions")


def few_shot_text(dataset: str, shots: int) -> str:
    """Return the first `shots` few-shot examples of a graded data set with their answers, one per line.

    Raises:
        Refusal: it has fewer.
    """
    if not shots:
        return ""
    examples = _graded_questions(dataset, "fewshot")
    if len(examples) < shots:
        raise Refusal(
            f"data set {dataset} has {len(examples)} few-shot examples, fewer than {shots}; lower shots."
        )
    return "".join(f"{question.prompt} {question.completion}\n" for question in examples[:shots])


def prompt_text(question: str, chat_template: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text before an answer: the question, in the tokenizer's chat template if wanted.

    Raises:
        Refusal: the tokenizer has no chat template, or one that fails.
    """
    if not chat_template:
        return question
    if not tokenizer.chat_template:
        raise Refusal(
            "chat_template is true, but the model's tokenizer has no chat template; set it to false."
        )
    return _chat([{"role": "user", "content": question}], tokenizer, add_generation_prompt=True)


def _chat(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    """Return turns of a chat as one text.

    Raises:
        Refusal: the template is damaged, or does not allow these turns.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except TemplateError as error:
        raise Refusal(
            f"the chat template of the model's tokenizer fails on turns of "
            f"{' and '.join(turn['role'] for turn in turns)} ({reason(error)}); set chat_template: "
            "false, leave out such turns, or use a checkpoint with a sound template."
        ) from error


def answer_example(question: Question, chosen: Selection, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return a question and its answer as an `Example` that predicts the answer.

    Raises:
        Refusal: the answer is empty, or the tokenizer does not show where it begins or ends.
    """
    before = prompt_text(question.prompt, chosen.chat_template, tokenizer)
    if chosen.chat_template:
        turns = [
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": question.completion},
        ]
        whole, end = _chat(turns, tokenizer), []
        if not whole.startswith(before):
            raise Refusal(
                "the chat template of the model's tokenizer changes the question once it is answered, so the "
                "answer cannot be separated from it; set chat_template: false."
            )
    else:
        whole, end = f"{before} {question.completion}", [end_of_text(tokenizer)]
    if not question.completion.strip():
        raise Refusal(f"data set {chosen.dataset}: the answer to {question.prompt[:60]!r} is empty.")
    bos = bos_tokens(tokenizer, chosen.bos)
    prompt = begin(tokenizer.encode(before, add_special_tokens=False), bos)
    tokens = begin(tokenizer.encode(whole, add_special_tokens=False), bos) + end
    # A tokenizer may merge the prompt's last letters with the answer; that token is predicted too.
    return example(torch.tensor(tokens), _shared(prompt, tokens))


def chat_example(
    turns: list[dict[str, str]], chosen: Selection, tokenizer: PreTrainedTokenizerBase
) -> Example:
    """Return a conversation as an `Example` that predicts the assistant's turns.

    Raises:
        Refusal: it has several turns and no chat template is asked for, or the template does not show where a
            response begins or ends.
    """
    if not chosen.chat_template:
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise Refusal(
                f"data set {chosen.dataset} has conversations of several turns, or with a system turn, which "
                "only a chat template can write; set chat_template: true."
            )
        return answer_example(Question(turns[0]["content"], turns[1]["content"]), chosen, tokenizer)
    prompt_text("", chat_template=True, tokenizer=tokenizer)  # refuses a tokenizer without a template

    def encoded(count: int, *, ask: bool) -> tuple[str, list[int]]:
        text = _chat(turns[:count], tokenizer, add_generation_prompt=ask)
        return text, begin(tokenizer.encode(text, add_special_tokens=False), bos)

    bos = bos_tokens(tokenizer, chosen.bos)
    whole, tokens = encoded(len(turns), ask=False)
    ids = torch.tensor(tokens)
    labels = torch.full_like(ids, IGNORED)
    for at, turn in enumerate(turns):
        if turn["role"] == "assistant":
            (before, prompt), (after, answered) = encoded(at, ask=True), encoded(at + 1, ask=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise Refusal(
                    "the chat template of the model's tokenizer changes earlier turns once later ones "
                    "follow, so responses cannot be separated from prompts; use conversations of a single "
                    "response."
                )
            part = slice(max(_shared(prompt, tokens), 1), _shared(answered, tokens))
            labels[part] = ids[part]
    return Example(ids, labels)


def _shared(first: list[int], second: list[int]) -> int:
    """Return the number of tokens that two rows have in common before they first differ."""
    pairs = zip(first, second, strict=False)
    return next((at for at, pair in enumerate(pairs) if len(set(pair)) > 1), min(len(first), len(second)))


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a text.

    Raises:
        Refusal: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise Refusal(
            "the model's tokenizer has no end-of-text token, so answers have no end; set its eos_token."
        )
    return int(tokenizer.eos_token_id)


def take_evenly(
    chosen: Selection, pool: Sequence[T], setting: Literal["num_samples", "held_out"], noun: str
) -> list[T]:
    """Take as many of `pool` as a setting says, evenly over difficulties and over the order within each.

    If the levels cannot share evenly, the first ones contribute one more. With `difficulty`, that level alone
    contributes.

    Args:
        noun: the members of `pool`, as a refusal names them.

    Raises:
        Refusal: a level has too few, or there is no such level.
    """
    count: int = getattr(chosen, setting)
    levels: dict[str, list[T]] = {}
    for item in pool:
        levels.setdefault(getattr(item, "difficulty", "all"), []).append(item)
    if not levels:
        raise Refusal(
            f"data set {chosen.dataset} has no {noun}, but {setting} is {count}; use another data set."
        )
    if chosen.difficulty is not None:
        if chosen.difficulty not in levels:
            raise Refusal(
                f"data set {chosen.dataset} has no {noun} of difficulty {chosen.difficulty}; set difficulty "
                f"to one of {', '.join(levels)}."
            )
        levels = {chosen.difficulty: levels[chosen.difficulty]}
    picked: list[T] = []
    for number, (level, items) in enumerate(levels.items()):
        share = count // len(levels) + (number < count % len(levels))
        if share > len(items):
            of_level = "" if len(levels) == 1 and chosen.difficulty is None else f" of difficulty {level}"
            raise Refusal(
                f"data set {chosen.dataset} has {len(items)} {noun}{of_level}, fewer than the {share} that "
                f"{setting} {count} takes; lower {setting}, or use a larger data set."
            )
        picked += [items[at] for at in spaced(len(items), share).tolist()]
    return picked


def _kind(dataset: str) -> str:
    return str(read_json(DATASETS / dataset / DATASET)["kind"])


def _window_examples(
    chosen: Selection, sequence_length: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[list[GradedExample], list[GradedExample]]:
    wanted = Windows(
        dataset=chosen.dataset,
        num_samples=chosen.num_samples,
        sequence_length=sequence_length,
        bos=chosen.bos,
    )
    learned = text_windows(tokenizer, wanted, vocab_size)
    bos = bos_tokens(tokenizer, chosen.bos)
    parts = distinct_windows(tokenizer, read_parts(chosen.dataset, "evaluation"), sequence_length, bos)
    counts = apportion({part.name: part.share * chosen.held_out for part, _ in parts}, chosen.held_out)
    held_out: list[Tensor] = []
    for part, windows in parts:
        if count := counts[part.name]:
            noun = " ".join(filter(None, [f"held-out windows of {sequence_length} tokens", part.name]))
            share = chosen.model_copy(update={"held_out": count})
            held_out += take_evenly(share, list(windows), "held_out", noun)
    learned_examples, held_out_examples = (
        [GradedExample(example(row, len(bos))) for row in rows] for rows in (learned, held_out)
    )
    return learned_examples, held_out_examples


def _graded_questions(dataset: str, split: str) -> list[Question]:
    rows = pd.read_parquet(DATASETS / dataset / f"{split}.parquet")
    return [Question(*row) for row in zip(rows["question"], rows["answer"], rows["difficulty"], strict=True)]


def _benchmark_questions(chosen: Selection) -> list[Question]:
    """Return the questions of the split; a prompt that repeats keeps its first row."""
    folder = DATASETS / chosen.dataset
    if not (folder / f"{chosen.split}.parquet").exists():
        splits = ", ".join(sorted(file.stem for file in folder.glob("*.parquet")))
        raise Refusal(f"data set {chosen.dataset} has no split {chosen.split}; set split to one of {splits}.")
    rows = pd.read_parquet(folder / f"{chosen.split}.parquet")
    for column in (chosen.prompt, chosen.completion):
        if column is not None and (column not in rows or not _is_text(rows[column])):
            texts = [str(name) for name in rows if _is_text(rows[name])]
            raise Refusal(
                f"data set {chosen.dataset} has no text column {column}; its text columns: "
                f"{', '.join(texts) or 'none'}."
            )
    distinct = rows.drop_duplicates(chosen.prompt)
    answers = distinct[chosen.completion] if chosen.completion else [""] * len(distinct)
    return [Question(*row) for row in zip(distinct[chosen.prompt], answers, strict=True)]


def _choose_chats(chosen: Selection) -> tuple[list[list[dict[str, str]]], list[list[dict[str, str]]]]:
    """Return the conversations to learn from and those held out; no first prompt is in both."""
    rows = pd.read_parquet(DATASETS / chosen.dataset / "train.parquet")["messages"]
    pool = [json.loads(turns) for turns in rows]
    learned = take_evenly(chosen, pool, "num_samples", "conversations")
    seen = {_first_prompt(turns) for turns in learned}
    rest = [turns for turns in pool if _first_prompt(turns) not in seen]
    return learned, take_evenly(chosen, rest, "held_out", "other conversations")


def _first_prompt(turns: list[dict[str, str]]) -> str:
    return next(turn["content"] for turn in turns if turn["role"] == "user")


def _is_text(column: pd.Series) -> bool:
    return all(isinstance(value, str) for value in column)

"""Calibration and training windows: the tokens a data-driven method may see.

Documents of a data set's calibration split are joined by a blank line, tokenized once and cut into
non-overlapping windows of equal length; the tail is dropped. Windows are spread evenly over the text, or
drawn from it with `seed`: other windows in another order show the noise of a method. A graded data set counts
as one document, whose lines are its training items, question and answer. Windows are never padded, so padding
cannot enter a statistic. Each part of a mix (see `stages.sources.mix`) is cut on its own and gives its share
of the windows, one part after the other. Windows are disjoint pieces of the text, so they are distinct unless
the text itself repeats, and repeated windows are dropped. Evaluation reads the other split (see
`stages.sources.documents`), which shares no document and no run of 13 words with this one; the splits of a
graded data set share no item.

Where the model expects it, BOS is the first of a window's tokens (see `stages.corpus.bos`), and the last of
its text gives way. So a window has `sequence_length` tokens and begins at the same place of the text, with
BOS and without.

A method may also be calibrated on the model's own continuations of those windows (`tokens: generated`, see
`stages.corpus.generation`) or, as a control, on no text at all: token ids drawn uniformly from the vocabulary
(`tokens: random`).

A tokenizer may have more tokens than the model's embedding has rows. Every id must be below the number of
rows, `vocab_size`: random ids are drawn below it, and text with other tokens is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import Discriminator, Field, Tag, model_validator

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.core.lazy import torch
from stages.core.numbers import apportion, generator, spaced
from stages.core.schema import NoData, Seed, Slug, Strict
from stages.corpus.bos import Bos, bos_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_DRAW_SETTINGS: dict[str, tuple[str, ...]] = {
    "text": (),
    "generated": ("prompt_length", "seed", "temperature"),
    "random": ("seed",),
}
"""The settings that each kind of tokens needs; the other kinds refuse them, but text may have a seed."""

Sequential = Literal["linear", "block", "none"]
"""Which linears are compressed when a statistic is taken, see `Calibration`."""


class Windows(Strict):
    """`num_samples` windows of `sequence_length` tokens of a data set, BOS included."""

    dataset: Slug
    num_samples: Annotated[int, Field(ge=1)] = 64
    sequence_length: Annotated[int, Field(ge=8)] = 512
    bos: Bos = "auto"


class Tokens(Windows):
    """The tokens a method is calibrated on: windows of text, of the model's own text, or of random ids."""

    tokens: Literal["text", "generated", "random"] = "text"
    """`text` of the data set; `generated` by the source model from the beginnings of the data set's windows;
    `random` ids other than special tokens, without a data set (`dataset: none`)."""
    seed: Seed | None = None
    """Seed of generated and random tokens. With text, windows are drawn in place of spread evenly."""
    temperature: Annotated[float, Field(ge=1e-6)] | None = None
    """Divides the logits of generated tokens; near zero the likeliest token is drawn."""
    prompt_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of each window, BOS included, that prompt the model, which generates the rest."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Windows per batch, for when memory is short. On CUDA null is about 65536 tokens for generating and
    16384 for reading; on a CPU all windows, or about 4096 tokens for reading unless `sequential` is
    `linear`."""

    @model_validator(mode="after")
    def _settings_of_a_kind(self) -> Self:
        present = {name for name in _DRAW_SETTINGS["generated"] if getattr(self, name) is not None}
        needed = set(_DRAW_SETTINGS[self.tokens])
        mistakes = []
        if missing := sorted(needed - present):
            mistakes.append(f"tokens {self.tokens} needs {', '.join(missing)}")
        if spare := sorted(present - needed - ({"seed"} if self.tokens == "text" else set())):
            mistakes.append(f"tokens {self.tokens} does not use {', '.join(spare)}; remove that")
        if self.tokens == "random" and self.dataset != "none":
            mistakes.append("tokens random reads no data set; set dataset: none")
        if self.prompt_length and self.prompt_length >= self.sequence_length:
            mistakes.append(
                f"prompt_length {self.prompt_length} leaves no tokens of sequence_length "
                f"{self.sequence_length} to generate; lower it"
            )
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


class Calibration(Tokens):
    """The calibration tokens, and which linears are already compressed when statistics are taken."""

    sequential: Sequential = "linear"
    """Which linears are compressed when a statistic is taken: all earlier linears (`linear`), those of
    earlier blocks (`block`), or none (`none`)."""


def tokens_or_none(value: Any) -> str:
    """Tell whether a calibration is `tokens` or `no-data`, from the settings or what they were read from."""

    def field(name: str) -> Any:
        return value.get(name) if isinstance(value, dict) else getattr(value, name, None)

    return "no-data" if field("dataset") == "none" and field("tokens") in (None, "text") else "tokens"


OptionalTokens = Annotated[
    Annotated[Tokens, Tag("tokens")] | Annotated[NoData, Tag("no-data")], Discriminator(tokens_or_none)
]
"""Tokens, or `{dataset: none}` if no other setting reads text."""


def cut_windows(tokenizer: PreTrainedTokenizerBase, documents: list[str], sequence_length: int) -> Tensor:
    """Cut documents into `[windows, sequence_length]` int64 token ids, tail dropped.

    No special tokens are added: the windows are running text. `begin_windows` adds BOS.
    """
    ids = tokenizer("\n\n".join(documents), add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = ids.numel() // sequence_length
    return ids[: count * sequence_length].view(count, sequence_length)


def begin_windows(windows: Tensor, tokens: list[int]) -> Tensor:
    """Put the tokens of `stages.corpus.bos.bos_tokens` before windows `[n, length]`, whose length grows."""
    return torch.cat([torch.tensor(tokens, dtype=windows.dtype).expand(len(windows), -1), windows], 1)


def read_documents(dataset: str, split: str, root: Path = DATASETS) -> list[str]:
    """Return the documents of a data set's split, in order.

    Args:
        split: `calibration` or `evaluation` of a text data set, or `train` of a graded one, each of whose
            documents is a question and its answer.
    """
    from pyarrow import parquet  # pandas takes longer to import

    rows = parquet.ParquetFile(root / dataset / f"{split}.parquet").read()
    if split == "train":
        pairs = zip(rows["question"].to_pylist(), rows["answer"].to_pylist(), strict=True)
        return [f"{question} {answer}" for question, answer in pairs]
    documents: list[str] = rows["text"].to_pylist()
    return documents


class TextPart(NamedTuple):
    """A text of a mix, or the only one of another data set, whose name is empty and whose share is 1."""

    name: str
    share: float
    documents: list[str]


def read_parts(dataset: str, split: str, root: Path = DATASETS) -> list[TextPart]:
    """Return the parts of a data set's split, `calibration` or `evaluation`, in order.

    The training items of a graded data set are its calibration split: the lines of one document.
    """
    from pyarrow import parquet

    if split == "calibration" and (root / dataset / "train.parquet").exists():
        return [TextPart("", 1.0, ["\n".join(read_documents(dataset, "train", root))])]
    rows = parquet.ParquetFile(root / dataset / f"{split}.parquet").read()
    if "part" not in rows.column_names:
        return [TextPart("", 1.0, read_documents(dataset, split, root))]
    parts: dict[str, TextPart] = {}
    for row in rows.to_pylist():
        parts.setdefault(row["part"], TextPart(row["part"], row["share"], [])).documents.append(row["text"])
    return list(parts.values())


def calibration_windows(tokenizer: PreTrainedTokenizerBase, wanted: Windows, vocab_size: int) -> Tensor:
    """Return `[num_samples, sequence_length]` int64 distinct windows, of text or of random ids.

    Generating windows takes the model: see `stages.corpus.generation.model_windows`.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        Refusal: there are too few distinct windows, or they have tokens without a row in the embedding.
    """
    if isinstance(wanted, Tokens) and wanted.tokens == "generated":
        raise ValueError("generated windows come from stages.corpus.generation.model_windows")
    if isinstance(wanted, Tokens) and wanted.tokens == "random":
        return _random_windows(tokenizer, wanted, vocab_size)
    return text_windows(tokenizer, wanted, vocab_size)


def text_windows(tokenizer: PreTrainedTokenizerBase, wanted: Windows, vocab_size: int) -> Tensor:
    """Return windows of the text, whatever `wanted.tokens`; see `calibration_windows`.

    They are spread evenly over it in its order, or drawn if `wanted` is text with a seed.
    """
    bos = bos_tokens(tokenizer, wanted.bos)
    parts = distinct_windows(
        tokenizer, read_parts(wanted.dataset, "calibration"), wanted.sequence_length, bos
    )
    counts = apportion({part.name: part.share * wanted.num_samples for part, _ in parts}, wanted.num_samples)
    chosen = []
    for part, distinct in parts:
        count = counts[part.name]
        if len(distinct) < count:
            raise Refusal(too_few_windows(wanted, part.name, len(distinct), count))
        if isinstance(wanted, Tokens) and wanted.tokens == "text" and wanted.seed is not None:
            draw = generator(" ".join(filter(None, [str(wanted.seed), "windows", part.name])))
            chosen.append(distinct[torch.randperm(len(distinct), generator=draw)[:count]])
        else:
            chosen.append(distinct[spaced(len(distinct), count)])
    rows = torch.cat(chosen)
    check_token_ids(rows, vocab_size, f"data set {wanted.dataset}", tokenizer)
    return rows


def distinct_windows(
    tokenizer: PreTrainedTokenizerBase, parts: list[TextPart], sequence_length: int, bos: list[int]
) -> list[tuple[TextPart, Tensor]]:
    """Return each part with its windows `[n, sequence_length]`, int64, after `bos`; all are distinct.

    Args:
        bos: the tokens of `stages.corpus.bos.bos_tokens`.
    """
    known = torch.empty((0, sequence_length), dtype=torch.int64)
    windows = []
    for part in parts:
        text = begin_windows(cut_windows(tokenizer, part.documents, sequence_length), bos)
        before, known = len(known), distinct_rows(torch.cat([known, text[:, :sequence_length]]))
        windows.append((part, known[before:]))
    return windows


def too_few_windows(wanted: Windows, part: str, available: int, count: int) -> str:
    """Say that a data set, or a part of a mix, has fewer distinct windows to learn from than `count`."""
    where = f"{wanted.dataset}, part {part}," if part else wanted.dataset
    return (
        f"data set {where} has {available} distinct windows of {wanted.sequence_length} "
        f"tokens to learn from, fewer than {count}; lower num_samples or sequence_length, "
        "or use a longer data set."
    )


def distinct_rows(rows: Tensor) -> Tensor:
    """Return the rows of `[n, length]` without repetitions, in order of first occurrence."""
    first_seen = list({tuple(row): i for i, row in reversed(list(enumerate(rows.tolist())))}.values())
    return rows[sorted(first_seen)]


def text_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Return the ids below `vocab_size` that stand for text, so not for special tokens, ascending, int64."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids)
    return torch.tensor(sorted(token_id for token_id in text if token_id < vocab_size))


def check_token_ids(ids: Tensor, vocab_size: int, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse token ids that have no row in the model's embedding.

    Args:
        ids: any shape, not empty.
        vocab_size: rows of the embedding.
        source: the source of the ids, as the refusal names it.

    Raises:
        Refusal: some id is `vocab_size` or more.
    """
    if (highest := int(ids.max())) >= vocab_size:
        raise Refusal(
            f"{source}: token {tokenizer.decode([highest])!r} has id {highest}, but the model's embedding "
            f"has {vocab_size} rows; use text without this token, or a checkpoint whose embedding covers its "
            "tokenizer."
        )


def _random_windows(tokenizer: PreTrainedTokenizerBase, wanted: Tokens, vocab_size: int) -> Tensor:
    assert wanted.seed is not None
    ids = text_token_ids(tokenizer, vocab_size)
    if not len(ids):
        raise Refusal(
            f"random tokens: no token of text has an id below {vocab_size}, the rows of the model's "
            "embedding; use a checkpoint whose embedding covers its tokenizer."
        )
    draw = torch.Generator().manual_seed(wanted.seed)
    drawn = ids[torch.randint(len(ids), (wanted.num_samples, wanted.sequence_length), generator=draw)]
    tokens = bos_tokens(tokenizer, wanted.bos)
    rows = begin_windows(drawn, tokens)[:, : wanted.sequence_length]
    check_token_ids(rows, vocab_size, "random tokens", tokenizer)
    if len(distinct_rows(rows)) < wanted.num_samples:
        raise Refusal(
            f"random tokens: some of {wanted.num_samples} windows of {wanted.sequence_length} tokens drawn "
            f"from {len(ids)} ids are equal; use another seed, fewer num_samples or a longer sequence_length."
        )
    return rows

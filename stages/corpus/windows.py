"""Calibration and training windows: the tokens a data-driven method is allowed to see.

Documents of a data set's calibration split are joined by a blank line, tokenized once and cut into
non-overlapping windows of equal length, the tail dropped. A graded data set is a document whose lines are
its training items, question and answer, as they are asked. No window is padded, so padding can never enter
a statistic; windows are disjoint pieces of the text, so they are distinct unless the text itself repeats,
and repeated windows are dropped. Evaluation reads the other split (see `stages.sources.text`), which
shares no document and no run of 13 words with this one; a graded data set's splits have no item in common.

A method's calibration may also be what the model itself says when given the beginnings of those windows
(`tokens: generated`, see `stages.corpus.generation`), or, as the control, no text at all: token ids drawn
evenly from the vocabulary (`tokens: random`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.core.lazy import pd, torch
from stages.core.schema import NoData, Seed, Slug, Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAWN: dict[str, tuple[str, ...]] = {
    "text": (),
    "generated": ("prompt_length", "seed", "temperature"),
    "random": ("seed",),
}
"""The settings each kind of tokens needs, and without which the others do."""


class Windows(Strict):
    """Which text is learned from: `num_samples` windows of `sequence_length` tokens of a data set."""

    dataset: Slug
    num_samples: Annotated[int, Field(ge=1)] = 64
    sequence_length: Annotated[int, Field(ge=8)] = 512


class Tokens(Windows):
    """What a method is calibrated on: windows of text, of what the model says, or of nothing but noise."""

    tokens: Literal["text", "generated", "random"] = "text"
    """`text` of the data set; `generated` by the source model from the beginnings of the data set's
    windows; `random` ids without special ones, of no data set (`dataset: none`)."""
    seed: Seed | None = None
    """Of what is drawn, where something is."""
    temperature: Annotated[float, Field(ge=1e-6)] | None = None
    """Of what is generated: logits are divided by it. Next to zero the likeliest token is drawn."""
    prompt_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a window that are given to the model, which generates the others."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Windows at a time, where memory is short; null is all of them where the model generates
    and about 4096 tokens where it reads."""

    @model_validator(mode="after")
    def _settings_of_a_kind(self) -> Self:
        given = {name for name in DRAWN["generated"] if getattr(self, name) is not None}
        needed = set(DRAWN[self.tokens])
        wrong = []
        if missing := sorted(needed - given):
            wrong.append(f"tokens {self.tokens} needs {', '.join(missing)}")
        if spare := sorted(given - needed):
            wrong.append(f"tokens {self.tokens} has no use for {', '.join(spare)}")
        if self.tokens == "random" and self.dataset != "none":
            wrong.append("tokens random reads no data set, say dataset: none")
        if self.prompt_length and self.prompt_length >= self.sequence_length:
            wrong.append(
                f"a prompt_length of {self.prompt_length} leaves none of sequence_length "
                f"{self.sequence_length} to generate"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class Calibration(Tokens):
    """The tokens a method's statistics are taken on, and what has happened to them on their way."""

    sequential: Literal["linear", "block", "none"] = "linear"
    """What a statistic has seen: inputs `linear` compressed by every linear before, `block` only by the
    blocks before, `none` dense throughout. `linear` needs all windows at once."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sequential == "linear" and (self.batch_size or self.num_samples) < self.num_samples:
            raise ValueError(
                f"sequential linear takes all {self.num_samples} windows at once; leave batch_size out, or "
                "say sequential: block (two passes) or none"
            )
        return self


def _kind(value: Any) -> str:
    def of(name: str) -> Any:
        return value.get(name) if isinstance(value, dict) else getattr(value, name, None)

    return "no-data" if of("dataset") == "none" and of("tokens") in (None, "text") else "tokens"


OptionalTokens = Annotated[
    Annotated[Tokens, Tag("tokens")] | Annotated[NoData, Tag("no-data")], Discriminator(_kind)
]
"""Tokens, or none where the rest of the recipe reads none."""


def windows(tokenizer: PreTrainedTokenizerBase, documents: list[str], sequence_length: int) -> torch.Tensor:
    """Cut documents into `[windows, sequence_length]` int64 token ids, tail dropped.

    Special tokens are not added: the windows are running text, as in the pruning papers.
    """
    ids = tokenizer("\n\n".join(documents), add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = ids.numel() // sequence_length
    return ids[: count * sequence_length].view(count, sequence_length)


def documents(dataset: str, split: str, root: Path = DATASETS) -> list[str]:
    """The documents of a data set's split, in order.

    Args:
        split: `calibration` or `evaluation` of a text data set, `train` of a graded one, whose documents
            are a question and its answer.
    """
    read = pd.read_parquet(root / dataset / f"{split}.parquet")
    if split == "train":
        return (read["question"] + " " + read["answer"]).tolist()
    return read["text"].tolist()


def learnable(dataset: str, root: Path = DATASETS) -> list[str]:
    """The documents of a data set that may be learned from, a graded one's items being lines of one."""
    if (root / dataset / "train.parquet").exists():
        return ["\n".join(documents(dataset, "train", root))]
    return documents(dataset, "calibration", root)


def calibration_windows(tokenizer: PreTrainedTokenizerBase, wanted: Windows) -> torch.Tensor:
    """`[num_samples, sequence_length]` distinct windows, of text spread evenly over what may be learned from.

    Windows that the model generates need the model: see `stages.corpus.generation.model_windows`.

    Raises:
        Refusal: there are fewer distinct windows than asked for.
    """
    if isinstance(wanted, Tokens) and wanted.tokens == "generated":
        raise ValueError("generated windows come from stages.corpus.generation.model_windows")
    if isinstance(wanted, Tokens) and wanted.tokens == "random":
        return _random(tokenizer, wanted)
    return text_windows(tokenizer, wanted)


def text_windows(tokenizer: PreTrainedTokenizerBase, wanted: Windows) -> torch.Tensor:
    """The data set's windows, whatever is to be made of them; see `calibration_windows`."""
    distinct = unrepeated(windows(tokenizer, learnable(wanted.dataset), wanted.sequence_length))
    if len(distinct) < wanted.num_samples:
        raise Refusal(
            f"data set {wanted.dataset}: {wanted.num_samples} windows of {wanted.sequence_length} "
            f"tokens were asked for, what may be learned from it holds {len(distinct)} distinct ones; lower "
            "num_samples or sequence_length, or name a longer data set."
        )
    picked = torch.linspace(0, len(distinct) - 1, wanted.num_samples).round().long()
    return distinct[picked]


def unrepeated(rows: torch.Tensor) -> torch.Tensor:
    """The rows of `[n, length]`, each once, where it comes first."""
    first_seen = list({tuple(row): i for i, row in reversed(list(enumerate(rows.tolist())))}.values())
    return rows[sorted(first_seen)]


def ordinary(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The ids of the vocabulary that stand for text, ascending, int64: special tokens are left out."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return torch.tensor(
        sorted(set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids))
    )


def _random(tokenizer: PreTrainedTokenizerBase, wanted: Tokens) -> torch.Tensor:
    assert wanted.seed is not None
    ids = ordinary(tokenizer)
    draw = torch.Generator().manual_seed(wanted.seed)
    made = ids[torch.randint(len(ids), (wanted.num_samples, wanted.sequence_length), generator=draw)]
    if len(unrepeated(made)) < wanted.num_samples:
        raise Refusal(
            f"random tokens: of {wanted.num_samples} windows of {wanted.sequence_length} tokens out of "
            f"{len(ids)} some are alike; take another seed, fewer num_samples or a longer sequence_length."
        )
    return made

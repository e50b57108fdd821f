"""Calibration and training windows: the text a data-driven method is allowed to see.

Documents of a data set's calibration split are joined by a blank line, tokenized once and cut into
non-overlapping windows of equal length, the tail dropped. No window is padded, so padding can never
enter a statistic; windows are disjoint pieces of the text, so they are distinct unless the text
itself repeats, and repeated windows are dropped. Evaluation reads the other split (see
`stages.download.text`), which shares no document and no run of 13 words with this one.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pandas as pd
import torch
from pydantic import Discriminator, Field, Tag, model_validator

from stages.core.errors import Refusal
from stages.core.schema import NoData, Slug, Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASETS = Path("data/datasets")


class Windows(Strict):
    """Which text is learned from: `num_samples` windows of `sequence_length` tokens of a data set."""

    dataset: Slug
    num_samples: Annotated[int, Field(ge=1)] = 64
    sequence_length: Annotated[int, Field(ge=8)] = 512


class Calibration(Windows):
    """The text a method's statistics are taken on, and what has happened to it on its way to a linear."""

    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Windows that are inside a block at a time, where memory is short; null is all of them."""
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
    dataset = value.get("dataset") if isinstance(value, dict) else getattr(value, "dataset", None)
    return "no-data" if dataset == "none" else "calibration"


OptionalCalibration = Annotated[
    Annotated[Calibration, Tag("calibration")] | Annotated[NoData, Tag("no-data")], Discriminator(_kind)
]
"""A text, or none where the rest of the recipe reads none."""


def windows(tokenizer: "PreTrainedTokenizerBase", documents: list[str], sequence_length: int) -> torch.Tensor:
    """Cut documents into `[windows, sequence_length]` int64 token ids, tail dropped.

    Special tokens are not added: the windows are running text, as in the pruning papers.
    """
    ids = tokenizer("\n\n".join(documents), add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = ids.numel() // sequence_length
    return ids[: count * sequence_length].view(count, sequence_length)


def documents(dataset: str, split: str, root: Path = DATASETS) -> list[str]:
    """The documents of a text data set's split, `calibration` or `evaluation`, in order."""
    return pd.read_parquet(root / dataset / f"{split}.parquet")["text"].tolist()


def calibration_windows(tokenizer: "PreTrainedTokenizerBase", wanted: Windows) -> torch.Tensor:
    """`[num_samples, sequence_length]` distinct windows, spread evenly over the calibration split.

    Raises:
        Refusal: the split holds fewer distinct windows than asked for.
    """
    cut = windows(tokenizer, documents(wanted.dataset, "calibration"), wanted.sequence_length)
    first_seen = list({tuple(row): i for i, row in reversed(list(enumerate(cut.tolist())))}.values())
    distinct = cut[sorted(first_seen)]
    if len(distinct) < wanted.num_samples:
        raise Refusal(
            f"data set {wanted.dataset}: {wanted.num_samples} windows of {wanted.sequence_length} "
            f"tokens were asked for, its calibration split holds {len(distinct)} distinct ones; lower "
            "num_samples or sequence_length, or name a longer data set."
        )
    picked = torch.linspace(0, len(distinct) - 1, wanted.num_samples).round().long()
    return distinct[picked]

"""Calibration and training windows: the text a data-driven method is allowed to see.

Documents of a data set's calibration split are joined by a blank line, tokenized once and cut into
non-overlapping windows of equal length, the tail dropped. No window is padded, so padding can never
enter a statistic; windows are disjoint pieces of the text, so they are distinct unless the text
itself repeats, and repeated windows are dropped. Evaluation reads the other split (see
`stages.download.text`), which shares no document and no run of 13 words with this one.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
import torch
from pydantic import Field

from stages.core.errors import Refusal
from stages.core.schema import Slug, Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASETS = Path("data/datasets")


class Calibration(Strict):
    """Which text a method reads: `num_samples` windows of `sequence_length` tokens of a data set."""

    dataset: Slug
    num_samples: Annotated[int, Field(ge=1)] = 64
    sequence_length: Annotated[int, Field(ge=8)] = 512


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


def calibration_windows(tokenizer: "PreTrainedTokenizerBase", wanted: Calibration) -> torch.Tensor:
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

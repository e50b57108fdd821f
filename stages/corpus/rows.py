"""Rows of tokens, packed or one by one, and the batches that are run forward.

Packing puts several examples in a row, so that short ones do not leave most of a batch to padding. Examples
of a row do not see each other: positions start again at each, attention is confined to it, and its first
token is never predicted. What an example contributes to the loss is then what it contributes in a row of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that is not predicted, as transformers has it."""


@dataclass(frozen=True)
class TopLogits:
    """What a teacher says at `n` predicted tokens, in their order.

    `tokens` `[n, k]` int64 are its likeliest, `log_probabilities` `[n, k + 1]` fp32 theirs and, in the last
    column, that of all other tokens together; `[n, k]` where k is the whole vocabulary.
    """

    tokens: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Example:
    """One text: `input_ids` `[n]` int64 and `labels` `[n]`, a token's own id where it is predicted.

    Elsewhere a label is `IGNORED`; the first always is.
    """

    input_ids: Tensor
    labels: Tensor
    teacher: TopLogits | None = None


def example(input_ids: Tensor, start: int = 1, teacher: TopLogits | None = None) -> Example:
    """The example of `input_ids` `[n]` in which all from token `start` on is predicted, the first never."""
    labels = input_ids.clone()
    labels[: max(start, 1)] = IGNORED
    return Example(input_ids, labels, teacher)


Row = tuple[Example, ...]
"""Examples that share a row of a batch: one, or as many as fit where they are packed."""


@dataclass(frozen=True)
class Batch:
    """Rows made equally long: `input_ids` and `labels` `[rows, length]`, padded on the right.

    Attention is causal, so nothing sees the padding after it. Where a row holds several examples,
    `position_ids` `[rows, length]` starts again at each; it is None where no row does.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    teacher: TopLogits | None
    tokens: int
    """Tokens that are not padding."""
    predicted: int
    """Tokens whose loss is taken."""


def pack(examples: Sequence[Example], sequence_length: int) -> list[Row]:
    """Rows of at most `sequence_length` tokens: each example, longest first, goes where it first fits."""
    rows: list[list[Example]] = []
    left: list[int] = []
    for one in sorted(examples, key=lambda one: -len(one.input_ids)):
        size = len(one.input_ids)
        place = next((at for at, room in enumerate(left) if room >= size), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(sequence_length)
        rows[place].append(one)
        left[place] -= size
    return [tuple(row) for row in rows]


def collate(rows: Sequence[Row]) -> Batch:
    """The batch that holds `rows`, on the CPU; padding is token 0, which is neither seen nor predicted."""
    examples = [one for row in rows for one in row]
    ids = [torch.cat([one.input_ids for one in row]) for row in rows]
    labels = [torch.cat([one.labels for one in row]) for row in rows]
    positions = None
    if any(len(row) > 1 for row in rows):
        length = max(map(len, ids))
        positions = torch.stack([_positions(row, length) for row in rows])
    taught = [one.teacher for one in examples if one.teacher is not None]
    teacher = None
    if taught:
        if len(taught) < len(examples):
            raise ValueError("a batch with a teacher needs its word on every example")
        teacher = TopLogits(
            torch.cat([one.tokens for one in taught]), torch.cat([one.log_probabilities for one in taught])
        )
    return Batch(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        positions,
        teacher,
        tokens=sum(map(len, ids)),
        predicted=int(sum((part != IGNORED).sum() for part in labels)),
    )


def _positions(row: Row, length: int) -> Tensor:
    """Positions from 0 in each example, and from 0 in the padding, which is thereby a text of its own."""
    sizes = [len(one.input_ids) for one in row]
    return torch.cat([torch.arange(size) for size in (*sizes, length - sum(sizes))])

"""Rows of tokens, packed or single, and the batches that are run forward.

Packing puts several examples into a row, so that short ones do not fill most of a batch with padding.
Examples of a row do not see each other: positions restart at each, attention is confined to it, and its first
token is never predicted. An example therefore contributes the same loss as in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that is not predicted, as in transformers."""


@dataclass(frozen=True)
class TopLogits:
    """A teacher's distributions at `n` predicted tokens, in order.

    `tokens` `[n, k]` int64 are the likeliest. `log_probabilities` `[n, k + 1]` fp32 has theirs and, in the
    last column, that of all other tokens together; it is `[n, k]` if k is the whole vocabulary.
    """

    tokens: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Example:
    """One text: `input_ids` `[n]` int64 and `labels` `[n]`, the token's own id where it is predicted.

    All other labels are `IGNORED`; the first always is.
    """

    input_ids: Tensor
    labels: Tensor
    teacher: TopLogits | None = None


def example(input_ids: Tensor, start: int = 1, teacher: TopLogits | None = None) -> Example:
    """Return the example of `input_ids` `[n]` that predicts every token from `start` on, except the first."""
    labels = input_ids.clone()
    labels[: max(start, 1)] = IGNORED
    return Example(input_ids, labels, teacher)


Row = tuple[Example, ...]
"""The examples in a row of a batch: one, or several packed ones."""


@dataclass(frozen=True)
class Batch:
    """Rows of equal length: `input_ids` and `labels` `[rows, length]`, padded on the right.

    Attention is causal, so no token sees the padding after it. If a row holds several examples,
    `position_ids` `[rows, length]` restarts at each; otherwise it is None.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    teacher: TopLogits | None
    sizes: tuple[int, ...]
    """Tokens of each row other than padding."""
    longest: tuple[int, ...]
    """Tokens of the longest example in each row."""
    predicted: int
    """Tokens that are predicted."""

    def part(self, places: Sequence[int]) -> Batch:
        """Return the batch of the rows at these places, without their teacher."""
        sizes, longest = (tuple(each[place] for place in places) for each in (self.sizes, self.longest))
        rows = (list(places), slice(max(sizes)))
        labels = self.labels[rows]
        positions = None if self.position_ids is None else self.position_ids[rows]
        predicted = int((labels != IGNORED).sum())
        return Batch(self.input_ids[rows], labels, positions, None, sizes, longest, predicted)


def pack(examples: Sequence[Example], sequence_length: int) -> list[Row]:
    """Pack examples, longest first, each into the first row where it keeps to `sequence_length` tokens."""
    rows: list[list[Example]] = []
    left: list[int] = []
    for item in sorted(examples, key=lambda item: -len(item.input_ids)):
        size = len(item.input_ids)
        place = next((at for at, room in enumerate(left) if room >= size), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(sequence_length)
        rows[place].append(item)
        left[place] -= size
    return [tuple(row) for row in rows]


def collate(rows: Sequence[Row]) -> Batch:
    """Return the batch of `rows`, on the CPU; padding is token 0, which is neither seen nor predicted."""
    examples = [item for row in rows for item in row]
    ids = [torch.cat([item.input_ids for item in row]) for row in rows]
    labels = [torch.cat([item.labels for item in row]) for row in rows]
    positions = None
    if any(len(row) > 1 for row in rows):
        length = max(map(len, ids))
        positions = torch.stack([_positions(row, length) for row in rows])
    teachers = [item.teacher for item in examples if item.teacher is not None]
    if teachers and len(teachers) < len(examples):
        raise ValueError("either all or none of a batch's examples must have a teacher")
    return Batch(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        positions,
        join_teachers(teachers) if teachers else None,
        sizes=tuple(map(len, ids)),
        longest=tuple(max(len(item.input_ids) for item in row) for row in rows),
        predicted=int(sum((part != IGNORED).sum() for part in labels)),
    )


def join_teachers(teachers: Sequence[TopLogits]) -> TopLogits:
    """Concatenate the distributions of several examples, which must have the same `k`."""
    return TopLogits(
        torch.cat([teacher.tokens for teacher in teachers]),
        torch.cat([teacher.log_probabilities for teacher in teachers]),
    )


def _positions(row: Row, length: int) -> Tensor:
    """Return positions that restart at each example; every token of padding is a text by itself."""
    sizes = [len(item.input_ids) for item in row]
    padding = torch.zeros(length - sum(sizes), dtype=torch.long)
    return torch.cat([*(torch.arange(size) for size in sizes), padding])

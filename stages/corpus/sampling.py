"""Sampling from given random numbers, up to a stop, inside the `generate` of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from stages.core.numbers import sample

Decode = Callable[[Sequence[int]], str]


class Sampled(LogitsProcessor):
    """Turn greedy decoding into sampling: leave only the token that a row's next number falls on.

    Args:
        start: tokens of the prompts.
        numbers: for each row as many as it may generate, in [0, 1), float64.
        temperature: divides the logits; 0 leaves them as they are.
        check: refuses logits that no token can be drawn from.
    """

    def __init__(
        self, start: int, numbers: Sequence[Tensor], temperature: float, check: Callable[[Tensor], None]
    ) -> None:
        self.start, self.numbers, self.temperature, self.check = start, numbers, temperature, check

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` `[rows, vocabulary]` with all but one entry of each row at minus infinity."""
        self.check(scores)
        if self.temperature == 0:
            return scores
        step = input_ids.shape[1] - self.start
        # A row that has used up its numbers is finished; its further tokens are cut off.
        uniform = [float(row[step]) if step < len(row) else 0.0 for row in self.numbers]
        token = sample(scores, torch.tensor(uniform, dtype=torch.float64), self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, token.to(scores.device), 0.0)


class Stopped(StoppingCriteria):
    """Tell which rows contain a stop or have reached their limit.

    Args:
        start: tokens of the prompts.
        limits: most tokens that each row may generate.
    """

    def __init__(self, start: int, limits: Sequence[int], stops: tuple[str, ...], decode: Decode) -> None:
        self.start, self.limits, self.stops, self.decode = start, limits, stops, decode
        self.tail = max((len(stop.encode()) for stop in stops), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return `[rows]` bool."""
        length = input_ids.shape[1] - self.start
        # A token has at least one byte, so a stop that ends now lies in the last tokens.
        tails = input_ids[:, -min(self.tail, length) :].tolist()
        done = [
            length >= limit or any(stop in text for stop in self.stops)
            for limit, text in zip(self.limits, map(self.decode, tails), strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


def stopped_at(row: Sequence[int], stops: tuple[str, ...], decode: Decode) -> int:
    """Return how many of the row's tokens lead up to its first stop, the stop included."""
    if not any(stop in decode(row) for stop in stops):
        return len(row)
    low, high = 1, len(row)
    while low < high:
        middle = (low + high) // 2
        if any(stop in decode(row[:middle]) for stop in stops):
            high = middle
        else:
            low = middle + 1
    return low

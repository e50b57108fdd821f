"""The choice of blocks to remove, by the scores of the literature on depth pruning.

A score says how much a block matters; the blocks with the lowest scores are removed, ties to the lower
number. Two scores look at the residual stream in one forward (block influence, the angle over a run of
blocks), three measure how much worse the model predicts without a block (perplexity, Shapley, greedy), and
`reverse` measures nothing. Blocks are numbered as in the source; `removable` are those that may be removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks
from stages.pruning.depth.ablate import Ablation
from stages.pruning.depth.observe import observe
from stages.pruning.depth.remove import Target
from stages.pruning.depth.tasks import Choices, retained

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ranking:
    """The blocks to remove, in ascending order, and their scores, for the artifact's notes."""

    removed: tuple[int, ...]
    notes: dict[str, Any] = field(default_factory=dict)


def lowest_blocks(scores: dict[int, float], count: int) -> tuple[int, ...]:
    """Return the `count` blocks with the lowest scores, in ascending order."""
    return tuple(sorted(sorted(scores, key=lambda number: (scores[number], number))[:count]))


def rank_by_score(scores: dict[int, float], count: int) -> Ranking:
    """Rank blocks by scores, of which the `count` lowest are removed."""
    return Ranking(lowest_blocks(scores, count), {"scores": _named(scores)})


def _named(scores: dict[int, float]) -> dict[str, float]:
    return {str(number): score for number, score in sorted(scores.items())}


def reverse(removable: list[int], count: int) -> Ranking:
    """Remove the last removable blocks (2602.01997); 2403.17887 does so but keeps the very last."""
    return Ranking(tuple(removable[-count:]))


def block_influence(
    model: PreTrainedModel, windows: Tensor, batch_size: int, target: Target
) -> dict[int, float]:
    """Return 1 - E cos(x_in, x_out) over tokens, by block (ShortGPT, 2403.03853).

    For an attention, x_out is x_in plus what the attention adds to it.
    """
    cosine = torch.nn.functional.cosine_similarity
    sums: dict[int, float] = dict.fromkeys(range(len(blocks(model))), 0.0)

    def add(number: int, before: Tensor, after: Tensor) -> None:
        sums[number] += float(cosine(before.double(), after.double(), dim=-1).sum())

    observe(model, windows, batch_size, target, add, "block influence")
    return {number: 1 - total / windows.numel() for number, total in sums.items()}


def angular(model: PreTrainedModel, windows: Tensor, batch_size: int, count: int) -> dict[int, float]:
    """Return arccos(cos(x_n, x_{n + count})) / pi by the first block n of a run of `count` (2403.17887).

    x_n is the stream before block n at the last token of a window; the mean over windows is returned.
    """
    cosine = torch.nn.functional.cosine_similarity
    depth = len(blocks(model))
    streams: list[list[Tensor]] = [[] for _ in range(depth + 1)]

    def collect(number: int, before: Tensor, after: Tensor) -> None:
        streams[number].append(before[:, -1].float())
        if number == depth - 1:
            streams[depth].append(after[:, -1].float())

    observe(model, windows, batch_size, "block", collect, "angular distance")
    joined = [torch.cat(parts).double() for parts in streams]
    return {
        start: float(cosine(joined[start], joined[start + count]).clamp(-1, 1).arccos().mean() / torch.pi)
        for start in range(depth - count + 1)
    }


def removable_runs(removable: list[int], count: int) -> list[int]:
    """Return the first blocks of all runs of `count` consecutive blocks among `removable`, ascending.

    Raises:
        Refusal: there is no such run.
    """
    free = set(removable)
    starts = [start for start in removable if free.issuperset(range(start, start + count))]
    if not starts:
        raise Refusal(f"keep leaves no run of {count} blocks to remove; keep fewer, or lower blocks.")
    return starts


def closest_run(distances: dict[int, float], starts: list[int], count: int) -> Ranking:
    """Remove the run of `count` blocks with the smallest distance among those that begin at `starts`."""
    (start,) = lowest_blocks({start: distances[start] for start in starts}, 1)
    return Ranking(tuple(range(start, start + count)), {"scores": _named(distances)})


def perplexity(ablation: Ablation, removable: list[int]) -> dict[int, float]:
    """Return the calibration loss, in nats per token, without each block (2407.16286)."""
    losses = ablation.losses(frozenset({number}) for number in removable)
    return {number: losses[frozenset({number})] for number in removable}


def shapley(ablation: Ablation, removable: list[int], samples: int, seed: int) -> dict[int, float]:
    """Return each block's mean drop in loss when blocks are added back in random order (2407.16286).

    An order starts from the model without any of `removable`. The mean over `samples` orders is an unbiased
    estimate of the Shapley value, and the values of all blocks add up to the loss they lower together.
    """
    draw = torch.Generator().manual_seed(seed)
    orders = [
        [removable[place] for place in torch.randperm(len(removable), generator=draw).tolist()]
        for _ in range(samples)
    ]
    chains = [[frozenset(order[place:]) for place in range(len(order) + 1)] for order in orders]
    losses = ablation.losses(omitted for chain in chains for omitted in chain)
    values = dict.fromkeys(removable, 0.0)
    for order, chain in zip(orders, chains, strict=True):
        for number, without, joined in zip(order, chain, chain[1:], strict=False):
            values[number] += (losses[without] - losses[joined]) / samples
    return values


Answering: TypeAlias = "Callable[[frozenset[int]], dict[str, float]]"
"""Omitted blocks -> the share of right answers that the model without them writes, by level."""


def greedy(
    ablation: Ablation,
    removable: list[int],
    count: int,
    items: Choices | None,
    write: Answering | None = None,
) -> Ranking:
    """Remove one block at a time: at each step the one without which the model is best.

    The model is judged by the calibration loss, or on graded items by the mean of accuracy / dense accuracy
    (2602.01997), with ties to the block without which the right choices are likelier.

    Args:
        write: judges by generated answers to the items; None by the likeliest choices.

    Raises:
        Refusal: the dense model answers no item right.
    """

    def accuracies(omitted: frozenset[int], likelihoods: Tensor) -> dict[str, float]:
        assert items is not None
        return write(omitted) if write else items.accuracies(likelihoods)

    nothing: frozenset[int] = frozenset()
    dense = accuracies(nothing, ablation.likelihoods([nothing])[nothing]) if items else {}
    removed = nothing
    steps = []
    for _ in tqdm(range(count), desc="greedy", unit="block"):
        candidates = [number for number in removable if number not in removed]
        likelihoods = ablation.likelihoods(removed | {number} for number in candidates)
        scores = {}
        for number in candidates:
            omitted = removed | {number}
            values = likelihoods[omitted]
            if items:
                kept = retained(accuracies(omitted, values), dense)
                scores[number] = -kept, -items.right_likelihood(values)
            else:
                scores[number] = ablation.loss(values), 0.0
        best = min(candidates, key=lambda number: (scores[number], number))
        removed |= {best}
        noted = {str(number): -score[0] if items else score[0] for number, score in sorted(scores.items())}
        steps.append({"removed": best, "scores": noted})
    return Ranking(tuple(sorted(removed)), {"steps": steps} | ({"dense_accuracy": dense} if items else {}))

"""Which blocks go: the scores of the literature on depth pruning.

Every score says what a block is worth; the lowest go, ties to the lower block number. Two look at the
residual stream in one forward (block influence, the angle over a run of blocks), three ask what the
model's predictions lose without a block (perplexity, Shapley, greedy), and `reverse` looks at nothing.
Blocks are numbered as in the source; `choices` are those that may go.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks
from stages.pruning.depth.ablate import Ablation
from stages.pruning.depth.observe import Target, observe
from stages.pruning.depth.tasks import Asked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ranking:
    """The blocks to remove, in ascending order, and for the artifact's notes how they were found."""

    removed: tuple[int, ...]
    notes: dict[str, Any] = field(default_factory=dict)


def lowest(scores: dict[int, float], count: int) -> tuple[int, ...]:
    """The `count` blocks with the lowest scores, in ascending order."""
    return tuple(sorted(sorted(scores, key=lambda number: (scores[number], number))[:count]))


def of(scores: dict[int, float], count: int) -> Ranking:
    """The lowest of `scores`, and the scores."""
    return Ranking(lowest(scores, count), {"scores": _named(scores)})


def _named(scores: dict[int, float]) -> dict[str, float]:
    return {str(number): score for number, score in sorted(scores.items())}


def reverse(choices: list[int], count: int) -> Ranking:
    """The last of `choices`; without the very last block, the simple strategy of 2403.17887."""
    return Ranking(tuple(choices[-count:]))


def block_influence(
    model: PreTrainedModel, windows: Tensor, batch_size: int, target: Target
) -> dict[int, float]:
    """1 - E cos(x_in, x_out) over tokens (ShortGPT, 2403.03853).

    Of an attention, x_out is x_in plus what the attention adds to it.
    """
    sums: dict[int, float] = dict.fromkeys(range(len(blocks(model))), 0.0)

    def see(number: int, before: Tensor, after: Tensor) -> None:
        sums[number] += float(cosine_similarity(before.double(), after.double(), dim=-1).sum())

    observe(model, windows, batch_size, target, see, "block influence")
    return {number: 1 - total / windows.numel() for number, total in sums.items()}


def angular(model: PreTrainedModel, windows: Tensor, batch_size: int, count: int) -> dict[int, float]:
    """arccos(cos(x_n, x_{n + count})) / pi by the first block n of a run of `count` (2403.17887).

    x_n is the stream before block n at the last token of a window; averaged over windows.
    """
    depth = len(blocks(model))
    streams: list[list[Tensor]] = [[] for _ in range(depth + 1)]

    def see(number: int, before: Tensor, after: Tensor) -> None:
        streams[number].append(before[:, -1].float())
        if number == depth - 1:
            streams[depth].append(after[:, -1].float())

    observe(model, windows, batch_size, "block", see, "angular distance")
    at = [torch.cat(parts).double() for parts in streams]
    return {
        start: float(cosine_similarity(at[start], at[start + count]).clamp(-1, 1).arccos().mean() / torch.pi)
        for start in range(depth - count + 1)
    }


def runs(choices: list[int], count: int) -> list[int]:
    """The first blocks of all runs of `count` blocks that hold only `choices`, ascending.

    Raises:
        Refusal: there is none.
    """
    free = set(choices)
    found = [start for start in choices if free.issuperset(range(start, start + count))]
    if not found:
        raise Refusal(f"keep leaves no run of {count} blocks to remove; keep fewer, or lower blocks.")
    return found


def run_of(distances: dict[int, float], starts: list[int], count: int) -> Ranking:
    """Of the runs of `count` blocks that begin at `starts`, that with the smallest distance."""
    (start,) = lowest({start: distances[start] for start in starts}, 1)
    return Ranking(tuple(range(start, start + count)), {"scores": _named(distances)})


def perplexity(ablation: Ablation, choices: list[int]) -> dict[int, float]:
    """The calibration loss in nats a token with the block left out (2407.16286)."""
    losses = ablation.losses(frozenset({number}) for number in choices)
    return {number: losses[frozenset({number})] for number in choices}


def shapley(ablation: Ablation, choices: list[int], samples: int, seed: int) -> dict[int, float]:
    """How much each block lowers the loss on joining those before it, over drawn orders (2407.16286).

    An order starts from the model without any of `choices`; the mean over `samples` orders is an unbiased
    estimate of the Shapley value, and the values of all blocks sum to the loss they lower together.
    """
    draw = torch.Generator().manual_seed(seed)
    orders = [
        [choices[place] for place in torch.randperm(len(choices), generator=draw).tolist()]
        for _ in range(samples)
    ]
    out = [[frozenset(order[place:]) for place in range(len(order) + 1)] for order in orders]
    losses = ablation.losses(one for chain in out for one in chain)
    values = dict.fromkeys(choices, 0.0)
    for order, chain in zip(orders, out, strict=True):
        for number, without, joined in zip(order, chain, chain[1:], strict=False):
            values[number] += (losses[without] - losses[joined]) / samples
    return values


def greedy(ablation: Ablation, choices: list[int], count: int, asked: Asked | None) -> Ranking:
    """One block at a time: each step removes that without which the model loses least.

    Measured by the calibration loss, or on `asked` tasks by the mean of accuracy / dense accuracy
    (2602.01997), ties there falling to the block that leaves the right answers likelier.

    Raises:
        Refusal: the dense model answers nothing right.
    """
    dense = asked.accuracies(ablation.likelihoods([frozenset()])[frozenset()]) if asked else {}
    gone: frozenset[int] = frozenset()
    steps = []
    for _ in tqdm(range(count), desc="greedy", unit="block"):
        tried = ablation.likelihoods(gone | {number} for number in choices if number not in gone)
        scores = {}
        for number in (number for number in choices if number not in gone):
            values = tried[gone | {number}]
            if asked:
                worth = -asked.retained(values, dense), -asked.of_right_answers(values)
            else:
                worth = ablation.loss(values), 0.0
            scores[number] = worth
        (best,) = sorted(scores, key=lambda number: (scores[number], number))[:1]
        gone |= {best}
        told = {str(number): -score[0] if asked else score[0] for number, score in sorted(scores.items())}
        steps.append({"removed": best, "scores": told})
    return Ranking(tuple(sorted(gone)), {"steps": steps} | ({"dense_accuracy": dense} if asked else {}))

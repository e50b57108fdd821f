"""Mutual information of paired vectors, estimated from samples by a small network (InfoNCE, 1807.03748).

For n pairs and every function f,

    I(x; y) >= log n + mean_i [ f(x_i, y_i) - log sum_j exp f(x_i, y_j) ],

and the network is the f that makes it tight: it learns to tell which y belongs to an x. The right side is at
most log n, however much information there is, so an estimate near `bound` says "at least this much". (The
bound of MINE, 1801.04062, has no such end, and on few samples it strays far beyond what they can show.) The
network is fitted on one half of the pairs and read on the other half, because a bound read where it was
fitted grows with the network.
"""

import math

import torch
from torch import Tensor, nn

_LEARNING_RATE = 1e-3
_DECAY = 1e-2
_BATCH = 32
"""Pairs among which a step of fitting tells which belong together."""


class _Critic(nn.Module):
    """f(x, y). Its first layer reads each side by itself, so all pairs of n rows cost n evaluations of it."""

    def __init__(self, x: int, y: int, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(x, width), nn.Linear(y, width)
        self.inner, self.out = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f from the outputs of `left` and `right`, `[..., width]`, which may broadcast."""
        values: Tensor = self.out(torch.relu(self.inner(torch.relu(x + y)))).squeeze(-1)
        return values

    def missing(self, x: Tensor, y: Tensor) -> Tensor:
        """Return how far the estimate from pairs `[n, any]` lies below log n, in nats."""
        left, right = self.left(x), self.right(y)
        pairs = torch.cat([self(rows[:, None], right) for rows in left.split(_BATCH)])
        return nn.functional.cross_entropy(pairs, torch.arange(len(pairs)))


def bound(pairs: int) -> float:
    """Return the largest estimate that so many pairs can give, in bits."""
    return math.log2(pairs - pairs // 2)


def mutual_information(x: Tensor, y: Tensor, steps: int, width: int, seed: int) -> float:
    """Return a lower bound on I(x; y) in bits, from 0 to `bound(n)`, fitted on half of the rows.

    Args:
        x, y: `[n, any]`, a pair a row.
    """
    half = len(x) // 2
    x, y = (_standardized(side, half) for side in (x, y))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = _Critic(x.shape[1], y.shape[1], width)
        optimizer = torch.optim.AdamW(critic.parameters(), _LEARNING_RATE, weight_decay=_DECAY)
        for _ in range(steps):
            rows = torch.randperm(half)[:_BATCH]
            loss = critic.missing(x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        missing = float(critic.missing(x[half:], y[half:])) / math.log(2)
    return min(max(bound(len(x)) - missing, 0.0), bound(len(x)))


def _standardized(side: Tensor, half: int) -> Tensor:
    """Shift and scale columns to mean 0 and variance 1 on the first half, which keeps the information."""
    center, spread = side[:half].mean(0), side[:half].std(0)
    return (side - center) / spread.clamp(min=1e-6 * spread.max().clamp(min=1e-30))

"""Mutual information of paired vectors, estimated from samples by a small network (MINE, 1801.04062).

The Donsker-Varadhan bound E_joint[f] - log E_marginal[exp f] holds for every function f; the network is the f
that makes it tight. It is fitted on one half of the pairs and read on the other half, because a bound read
where it was fitted grows with the network.
"""

import math

import torch
from torch import Tensor, nn

_LEARNING_RATE = 1e-3
_DECAY = 1e-2


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


def mutual_information(x: Tensor, y: Tensor, steps: int, width: int, seed: int) -> float:
    """Return a lower bound on I(x; y) in bits, at least 0, fitted on half of the rows and read on the rest.

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
            left, right = critic.left(x[:half]), critic.right(y[:half])
            other = right.roll(int(torch.randint(1, half, ())), 0)  # pairs every row with another row
            loss = critic(left, other).logsumexp(0) - math.log(half) - critic(left, right).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        left, right = critic.left(x[half:]), critic.right(y[half:])
        pairs = torch.stack([critic(row, right) for row in left])
        joint = pairs.diagonal().mean()
        others = pairs[~torch.eye(len(pairs), dtype=torch.bool)]
        nats = float(joint - others.logsumexp(0) + math.log(len(others)))
    return max(nats, 0.0) / math.log(2)


def _standardized(side: Tensor, half: int) -> Tensor:
    """Shift and scale columns to mean 0 and variance 1 on the first half, which keeps the information."""
    center, spread = side[:half].mean(0), side[:half].std(0)
    return (side - center) / spread.clamp(min=1e-6 * spread.max().clamp(min=1e-30))

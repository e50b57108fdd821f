"""Arithmetic that several methods share, defined once: shares as counts, seeds, draws, finiteness."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import wraps
from math import ceil, floor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from stages.core.errors import Refusal
from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def count_of(share: float, total: int) -> int:
    """Round `share` of `total` things down to a whole number.

    The slack keeps a decimal share from losing one to binary rounding: 0.29 of 100 is 29.
    """
    return floor(total * share + 1e-6)


def apportion(parts: dict[str, float], total: int) -> dict[str, int]:
    """Round `parts`, none negative, to whole numbers that sum to `total`, each within one of its part.

    The largest remainders are rounded up; ties go to the first.

    Args:
        total: less than one away from the sum of all parts.
    """
    counts = {name: max(ceil(part) - 1, 0) for name, part in parts.items()}
    order = sorted(parts, key=lambda name: counts[name] - parts[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def spaced(total: int, count: int) -> Tensor:
    """Return `count` evenly spaced numbers of 0 to `total` - 1, both ends included, `[count]` int64."""
    return torch.linspace(0, total - 1, count).round().long()


def seed_of(text: str, size: int = 7) -> int:
    """Derive a seed of `size` bytes from a text that names the draw, such as `"7 model.layers.0.mlp"`.

    Draws with different names are independent, whatever order they are made in.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")


def generator(text: str, size: int = 7) -> torch.Generator:
    """Make a CPU generator seeded by the name of the draw, see `seed_of`."""
    return torch.Generator().manual_seed(seed_of(text, size))


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    The token is the first at which the cumulative probability exceeds the row's number. Numbers are drawn by
    the caller, so neither the device nor the batch size decides which number a row gets.

    Args:
        logits: `[rows, vocabulary]`, any float dtype, on any device.
        uniform: `[rows]` fp64 in [0, 1), on the CPU.
        temperature: above 0; logits are divided by it.

    Returns:
        `[rows, 1]` int64 on the CPU.
    """
    total = (logits.cpu().double() / temperature).softmax(1).cumsum(1)
    # Rounding may leave the total below 1, and the last number above it.
    drawn = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
    return drawn.clamp(max=logits.shape[1] - 1)


def no_grad(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function without recording gradients; torch's own decorator would import torch here."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def all_finite(values: Tensor) -> Tensor:
    """Return whether no value is NaN or infinite, a bool on the device of `values`; true of no values."""
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    # The extremes of a tensor are NaN if any value is; much faster than a mask of the tensor's size.
    return torch.stack(values.aminmax()).isfinite().all()


def finite(values: Tensor) -> bool:
    """Tell whether no value is NaN or infinite; a card finishes all its work first, see `all_finite`."""
    return bool(all_finite(values))


def check_finite(what: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors with NaN or infinite values, by name. A device is waited for once.

    Raises:
        Refusal: some values are NaN or infinite.
    """
    flags = {name: all_finite(tensor.detach()) for name, tensor in named}
    sound = torch.stack(list(flags.values())).tolist() if flags else []  # read at once
    if broken := [name for name, each in zip(flags, sound, strict=True) if not each]:
        raise Refusal(
            f"{what}: NaN or infinite values in {', '.join(broken[:8])}; nothing was written. Use another "
            "source, or run in float32 if the model is sound."
        )

"""Statistics of a linear's calibration inputs, accumulated in fp32.

A statistic is fed the inputs of one linear, one row per token, in bounded chunks, and never keeps them.
Linears that read the same tensor (q, k and v; gate and up) share one statistic and whatever is expensive to
derive from it, such as a Cholesky factor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import finite

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CHUNK_TOKENS = 2048
"""Tokens upcast to fp32 at a time, to bound the memory a statistic takes."""
STRIPE_ROWS = 192
"""Rows of a Hessian computed at a time, from the diagonal on; the other half mirrors them."""


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply fp32 copies of bf16 values in bf16 with fp32 sums; other dtypes are multiplied as usual.

    A product of two bf16 numbers is exact in fp32, so only the order of the sum differs. It is twice as fast
    on CPUs with bf16 units. The setting is the process's, so it is restored.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Statistic:
    """Sums over the tokens of a linear's inputs."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add `inputs`, `[tokens, in_features]` of any float dtype."""
        for chunk in inputs.split(CHUNK_TOKENS):
            self._add(chunk)
        self.num_tokens += inputs.shape[0]

    def _add(self, inputs: Tensor) -> None:
        raise NotImplementedError

    def finite(self) -> bool:
        """Tell whether the sums are finite. A NaN input must make this False, or it would go unnoticed."""
        raise NotImplementedError

    def dead(self) -> Tensor:
        """Return which features were zero on every token, `[in_features]` bool; empty if not recorded."""
        return torch.zeros(0, dtype=torch.bool)


class ColumnNorm(Statistic):
    """Root mean square of each input feature (Wanda, 2306.11695)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._squares = torch.zeros(in_features, device=device)

    def _add(self, inputs: Tensor) -> None:
        self._squares += inputs.to(torch.float32, copy=True).square_().sum(0)

    def finite(self) -> bool:
        """Tell whether the sums of squares are finite."""
        return finite(self._squares)

    def dead(self) -> Tensor:
        """Return which features were zero on every token, `[in_features]` bool."""
        return self._squares == 0

    def norm(self) -> Tensor:
        """Return sqrt(mean over tokens of x_j^2), `[in_features]` fp32.

        Raises:
            Refusal: the squares overflow fp32.
        """
        _check_sums(self._squares)
        return (self._squares / self.num_tokens).sqrt()


class Hessian(Statistic):
    """H = (2/n) sum of x xT, the second derivative of a linear's squared output error.

    See GPTQ (2210.17323) and SparseGPT (2301.00774).
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._sum = torch.zeros(in_features, in_features, device=device)  # only the upper half is filled
        self._factors: dict[tuple[float, bool], Tensor] = {}

    def _add(self, inputs: Tensor) -> None:
        wide = inputs.float()
        with exact_products(inputs.dtype):
            for start in range(0, len(self._sum), STRIPE_ROWS):
                stop = start + STRIPE_ROWS
                self._sum[start:stop, start:] += wide[:, start:stop].T @ wide[:, start:]

    def finite(self) -> bool:
        """Tell whether the diagonal is finite; no product of two features exceeds the larger's square."""
        return finite(self._sum.diagonal())

    def matrix(self) -> Tensor:
        """Return H, `[in, in]` fp32.

        Raises:
            Refusal: H is not finite.
        """
        upper = self._sum.triu() * (2 / self.num_tokens)
        _check_sums(upper)
        return upper + upper.triu(1).T

    def dead(self) -> Tensor:
        """Return which features were zero on every token, `[in]` bool."""
        return self._sum.diagonal() == 0

    def order(self) -> Tensor:
        """Return the features by descending diagonal of H, `[in]` int64; ties go to the lower index."""
        return self._sum.diagonal().argsort(descending=True, stable=True)

    def inverse_factor(self, damping: float, *, descending: bool = False) -> Tensor:
        """Return the upper Cholesky factor U with UT U = (H + damping * mean(diag H) * I)^-1, `[in, in]`.

        A dead feature's diagonal is set to 1, so it takes no part. With both dimensions reversed, the factor
        of H itself is the inverse of U. The result is cached.

        Args:
            descending: take the features of H in `order`.

        Raises:
            Refusal: H is not finite, or not positive definite even when damped.
        """
        if (damping, descending) not in self._factors:
            hessian = self.matrix()
            hessian.diagonal()[self.dead()] = 1
            hessian.diagonal().add_(damping * hessian.diagonal().mean())
            if descending:
                hessian = hessian[self.order()][:, self.order()]
            lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
            upper = _inverse(lower).flip(0, 1)
            if failed or not finite(upper):
                raise Refusal(
                    f"the Hessian of {len(hessian)} features over {self.num_tokens} tokens is not positive "
                    f"definite with damping {damping}; raise damping or calibrate on more tokens."
                )
            self._factors[damping, descending] = upper.contiguous()
        return self._factors[damping, descending]


def _inverse(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by halves, so that most of the work is plain products."""
    size = len(lower)
    if size <= STRIPE_ROWS:
        return torch.linalg.solve_triangular(lower, torch.eye(size, device=lower.device), upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = first = _inverse(lower[:half, :half])
    inverse[half:, half:] = second = _inverse(lower[half:, half:])
    inverse[half:, :half] = -(second @ (lower[half:, :half] @ first))
    return inverse


class DeadInputs:
    """A log of input features that no token activates, and of what happens to their weights.

    A linear is logged again only when more of its features are dead than before.

    Args:
        fate: what happens to the weights, completing "their weights are ...".
        reason: why the features count as dead, completing "5 of 32 input features ...".
    """

    def __init__(self, fate: str, reason: str = "are zero on every token") -> None:
        self._fate, self._reason = fate, reason
        self._counts: dict[str, int] = {}

    def log(self, linear: str, dead: Tensor) -> None:
        """Log how many features of a linear, by its full name, are `dead`, `[in]` bool."""
        count = int(dead.sum())
        if count > self._counts.get(linear, 0):
            self._counts[linear] = count
            log.info(
                "%s: %d of %d input features %s; their weights are %s",
                linear, count, len(dead), self._reason, self._fate,
            )  # fmt: skip


def _check_sums(sums: Tensor) -> None:
    if not finite(sums):
        raise Refusal("the squares of its inputs overflow fp32; check the model for broken activations.")

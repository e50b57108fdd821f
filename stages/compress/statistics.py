"""What a method learns from the calibration inputs of a linear, accumulated in fp32.

A statistic is fed the inputs of one linear, one row a token, in bounded chunks, and never keeps them.
Linears that read the same tensor (q, k and v; gate and up) share one statistic, and with it the
expensive things derived from it, such as a Cholesky factor.
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

CHUNK = 2048
"""Tokens upcast to fp32 at a time, which bounds the memory a statistic adds."""
STRIPE = 192
"""Rows of a Hessian computed at a time, each from the diagonal on, as the other half mirrors it."""


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply fp32 copies of `dtype` values in `dtype` and sum in fp32, where that loses nothing.

    A product of two bf16 numbers is exact in fp32, so only the order of the sum differs; twice as fast on
    CPUs with bf16 units. The switch is the process's, hence put back.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Statistic:
    """Sums over tokens, built from the first inputs seen so that device and width are known."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, `[tokens, in_features]`, any float dtype."""
        for chunk in inputs.split(CHUNK):
            self._add(chunk)
        self.num_tokens += inputs.shape[0]

    def _add(self, inputs: Tensor) -> None:
        raise NotImplementedError

    def finite(self) -> bool:
        """Whether all sums are numbers; they must not be once an input was none, or it would pass unseen."""
        raise NotImplementedError

    def dead(self) -> Tensor:
        """`[in_features]` bool: features that were zero on every token, about which nothing is known."""
        return torch.zeros(0, dtype=torch.bool)  # a statistic that does not tell


class ColumnNorm(Statistic):
    """Mean of the squares of every input feature (Wanda, 2306.11695)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._squares = torch.zeros(in_features, device=device)

    def _add(self, inputs: Tensor) -> None:
        self._squares += inputs.to(torch.float32, copy=True).square_().sum(0)

    def finite(self) -> bool:
        """Whether every feature's is."""
        return finite(self._squares)

    def dead(self) -> Tensor:
        """`[in_features]` bool: features that were zero on every token."""
        return self._squares == 0

    def norm(self) -> Tensor:
        """`[in_features]` fp32: sqrt(mean over tokens of x_j squared).

        Raises:
            Refusal: the squares are more than fp32 holds.
        """
        _check_sums(self._squares)
        return (self._squares / self.num_tokens).sqrt()


class Hessian(Statistic):
    """H = (2/n) sum of x xT, the second derivative of a linear's squared output error.

    See GPTQ (2210.17323) and SparseGPT (2301.00774).
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._sum = torch.zeros(in_features, in_features, device=device)  # of use from the diagonal on
        self._factors: dict[tuple[float, bool], Tensor] = {}

    @classmethod
    def of(cls, matrix: Tensor) -> Hessian:
        """A Hessian given as it is, `[in, in]`; for tests against other implementations."""
        made = cls(matrix.shape[0], matrix.device)
        made._sum, made.num_tokens = matrix.float() / 2, 1
        return made

    def _add(self, inputs: Tensor) -> None:
        wide = inputs.float()
        with exact_products(inputs.dtype):
            for start in range(0, len(self._sum), STRIPE):
                self._sum[start : start + STRIPE, start:] += (
                    wide[:, start : start + STRIPE].T @ wide[:, start:]
                )

    def finite(self) -> bool:
        """Whether the diagonal is: a product of two features is no more than the larger one's square."""
        return finite(self._sum.diagonal())

    def matrix(self) -> Tensor:
        """`[in, in]` fp32.

        Raises:
            Refusal: it is not finite.
        """
        upper = self._sum.triu() * (2 / self.num_tokens)
        _check_sums(upper)
        return upper + upper.triu(1).T

    def dead(self) -> Tensor:
        """`[in]` bool: features that were zero on every token."""
        return self._sum.diagonal() == 0

    def order(self) -> Tensor:
        """`[in]` int64: the features by descending diagonal of H, ties to the lower one."""
        return self._sum.diagonal().argsort(descending=True, stable=True)

    def inverse_factor(self, damping: float, *, descending: bool = False) -> Tensor:
        """Upper Cholesky factor U of the inverse, UT U = (H + damping * mean(diag H) * I)^-1, `[in, in]`.

        A dead feature's diagonal is set to 1 so that it takes no part. Computed once a damping: with both
        dimensions reversed, the factor of H itself is U's inverse.

        Args:
            descending: of H with its features in `order`.

        Raises:
            Refusal: H is not positive definite even damped, or not finite.
        """
        if (damping, descending) not in self._factors:
            hessian = self.matrix()
            hessian.diagonal()[self.dead()] = 1
            hessian.diagonal().add_(damping * hessian.diagonal().mean())
            if descending:
                hessian = hessian[self.order()][:, self.order()]
            lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
            upper = _inverted(lower).flip(0, 1)
            if failed or not finite(upper):
                raise Refusal(
                    f"the Hessian of {len(hessian)} features over {self.num_tokens} tokens is not positive "
                    f"definite with damping {damping}; raise damping or calibrate on more tokens."
                )
            self._factors[damping, descending] = upper.contiguous()
        return self._factors[damping, descending]


def _inverted(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, half by half: most of it is plain products."""
    size = len(lower)
    if size <= STRIPE:
        return torch.linalg.solve_triangular(lower, torch.eye(size, device=lower.device), upper=False)
    half = size // 2
    out = torch.zeros_like(lower)
    out[:half, :half] = first = _inverted(lower[:half, :half])
    out[half:, half:] = second = _inverted(lower[half:, half:])
    out[half:, :half] = -(second @ (lower[half:, :half] @ first))
    return out


class DeadInputs:
    """Logs by name how many of a linear's inputs nothing is known about, and what is done.

    Asked again, as by methods that go in steps, it says only where they are more than before.

    Args:
        then: what becomes of their weights.
        seen: why nothing is known.
    """

    def __init__(self, then: str, seen: str = "are zero on every token") -> None:
        self._then, self._seen = then, seen
        self._told: dict[str, int] = {}

    def tell(self, name: str, dead: Tensor) -> None:
        """Of the linear of this full name those in `dead`, `[in]` bool."""
        count = int(dead.sum())
        if count > self._told.get(name, 0):
            self._told[name] = count
            log.info(
                "%s: %d of %d input features %s; their weights are %s",
                name, count, len(dead), self._seen, self._then,
            )  # fmt: skip


def _check_sums(sums: Tensor) -> None:
    if not finite(sums):
        raise Refusal("the squares of its inputs are more than fp32 holds; look for broken activations.")

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
from stages.core.numbers import all_finite, finite

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CHUNK_TOKENS, CARD_CHUNK_TOKENS = 2048, 2**13
"""Tokens added at a time, on a CPU and on CUDA, to bound memory and the error of a sum.

Tensor cores cut off what does not fit a sum: on an H200 sums of squares were 3e-5 too low with chunks of 8192
tokens and 3e-4 with 65536 at once, where plain fp32 was 2e-5 off.
"""
STRIPE_ROWS, CARD_STRIPE_ROWS = 192, 1024
"""Rows of a Hessian computed at a time, from the diagonal on; the other half mirrors them."""
LEAF_ROWS, CARD_LEAF_ROWS = 192, 1024
"""Rows of a triangular matrix that are inverted by substitution, see `_invert`."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left.T @ right` to `total`, `[a, b]` fp32, in place; the sums are fp32.

    Products of two bf16 or two fp16 numbers are exact in fp32, so tensor cores, which multiply them as they
    are, change nothing but the order of the sum. fp32 values are multiplied in full precision.

    Args:
        left: `[tokens, a]`; bf16 and fp16 only on CUDA.
        right: `[tokens, b]`, as `left`.
    """
    if left.dtype == torch.float32:
        total += left.T @ right
    else:
        total += torch.mm(left.T, right, out_dtype=torch.float32)


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply fp32 copies of bf16 values in bf16 with fp32 sums on a CPU; other dtypes as usual.

    It is twice as fast on CPUs with bf16 units. The setting is the process's, so it is restored.
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
        for chunk in inputs.split(CARD_CHUNK_TOKENS if inputs.is_cuda else CHUNK_TOKENS):
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
        if inputs.is_cuda:  # without a copy of the inputs
            self._squares += torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square_()
        else:
            self._squares += inputs.to(torch.float32, copy=True).square_().sum(0)

    def finite(self) -> bool:
        """Tell whether the sums of squares are finite."""
        return finite(self._squares)

    def dead(self) -> Tensor:
        """Return which features were zero on every token, `[in_features]` bool."""
        return self._squares == 0

    def norm(self) -> Tensor:
        """Return sqrt(mean over tokens of x_j^2), `[in_features]` fp32."""
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
        values, rows = (inputs, CARD_STRIPE_ROWS) if inputs.is_cuda else (inputs.float(), STRIPE_ROWS)
        with exact_products(inputs.dtype):
            for start in range(0, len(self._sum), rows):
                stop = start + rows
                add_product(self._sum[start:stop, start:], values[:, start:stop], values[:, start:])

    def finite(self) -> bool:
        """Tell whether the diagonal is finite; no product of two features exceeds the larger's square."""
        return finite(self._sum.diagonal())

    def matrix(self) -> Tensor:
        """Return H, `[in, in]` fp32."""
        hessian = self._sum * (2 / self.num_tokens)
        rows = CARD_STRIPE_ROWS if hessian.is_cuda else STRIPE_ROWS
        for start in range(0, len(hessian), rows):  # of a large model a second copy is gigabytes
            stop = start + rows
            corner = hessian[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
            hessian[stop:, start:stop] = hessian[start:stop, stop:].T
        return hessian

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
            Refusal: H is not positive definite even when damped.
        """
        if (damping, descending) not in self._factors:
            hessian = self.matrix()
            hessian.diagonal().masked_fill_(self.dead(), 1)
            hessian.diagonal().add_(damping * hessian.diagonal().mean())
            if descending:
                hessian = hessian[self.order()]
                hessian = hessian[:, self.order()]
            hessian = hessian.flip(0, 1)
            lower, failed = torch.linalg.cholesky_ex(hessian)
            del hessian  # which is as large as what follows
            _invert(lower)
            upper = lower.flip(0, 1)
            del lower
            if not (all_finite(upper) & (failed == 0)):
                raise Refusal(
                    f"the Hessian of {len(upper)} features over {self.num_tokens} tokens is not positive "
                    f"definite with damping {damping}; raise damping or calibrate on more tokens."
                )
            self._factors[damping, descending] = upper.contiguous()
        return self._factors[damping, descending]


def _invert(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves, so that most of the work is plain products."""
    size = len(lower)
    if size <= (CARD_LEAF_ROWS if lower.is_cuda else LEAF_ROWS):
        identity = torch.eye(size, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(second)
    below.copy_(second @ (below @ first)).neg_()


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

"""HQQ: in its own norm never worse than round to nearest, and better where weights have outliers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stages.model.grid import Codes, Integers, bounds
from stages.quantization.hqq import HQQ
from tests.families import DEVICE

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def hqq(bits: int, group_size: int | None, symmetric: bool = False, **options) -> HQQ:
    return HQQ(
        source="base/m", method="hqq", bits=bits, group_size=group_size, symmetric=symmetric,
        calibration={"dataset": "none"}, **options,
    )  # fmt: skip


def lost(weight: torch.Tensor, code: Codes, p: float = 0.7) -> torch.Tensor:
    """Return the norm of each group's error, by its definition.

    Errors are fp32, as the method sees them: to the power p, the last bits of an error near zero count.
    """
    groups = code.scale.shape[1]
    steps = code.codes.float() - (0 if code.zero_point is None else wide(code.zero_point, weight))
    away = weight.float() - steps * wide(code.scale, weight)
    return away.double().abs().pow(p).view(len(weight), groups, -1).sum(2)


def wide(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values.float().repeat_interleave(weight.shape[1] // values.shape[1], 1)


def outliers(seed: int) -> torch.Tensor:
    """Draw a weight with a few large entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=generator).to(DEVICE)
    return weight * (1 + 5 * (torch.rand(weight.shape, generator=generator).to(DEVICE) > 0.97))


def halfway(code: float) -> bool:
    return abs(code % 1 - 0.5) < 1e-5


class Splitting:
    """Half-quadratic splitting as published, one number at a time in double precision.

    Besides the published steps (the shrinkage, and the zero point mean(q - (w - e) / s)) there are the two
    in which the method here differs: least squares for the scale, and a whole zero point in the result.
    Quotients are fp32, because the largest weight of a symmetric group lies halfway between two codes.

    Attributes:
        paths: for each group the (scale, zero point, error) it had, that of round to nearest first.
        certain: of each path, how many grids fp32 reaches too; with the next ones the error falls or rises
            by rounding alone.
        unsure: groups with a quotient so near a tie, after the first iteration, that fp32 may round it the
            other way.
        nonzero_errors: how often e was not zero.
    """

    def __init__(
        self, weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, p: float, beta: float,
        kappa: float, iterations: int,
    ) -> None:  # fmt: skip
        self.low, self.high = bounds(bits)
        self.p, self.symmetric = p, symmetric
        self.nonzero_errors, self.unsure = 0, set()
        self.paths: list[list[tuple[float, float, float]]] = []
        groups = weight.double().view(-1, group_size).tolist()
        for group in groups:
            least, most = min(0.0, *group), max(0.0, *group)
            if symmetric:
                s, z = float(np.float32(max(-least, most) / ((2**bits - 1) / 2))), 0.0
            else:
                s = (most - least) / (self.high - self.low)
                z = min(max(float(round(self.low - least / s)), self.low), self.high)
            self.paths.append([(s, z, self.norm(group, s, z))])
        grids = [path[0][:2] for path in self.paths]
        before, self.certain = float("inf"), 0
        for count in range(1, iterations + 1):
            now = sum(path[-1][2] for path in self.paths)
            if now >= before * (1 - 1e-6) and not self.certain:
                self.certain = count
            if now > before * (1 + 1e-6):
                break
            before = now
            for number, group in enumerate(groups):
                grids[number] = s, z = self.step(group, *grids[number], beta)
                self.paths[number].append((s, float(round(z)), self.norm(group, s, float(round(z)))))
                if halfway(z) or any(self.near_tie(w, s, t) for w in group for t in (z, round(z))):
                    self.unsure.add(number)
            beta *= kappa
        self.certain = self.certain or iterations + 1

    def quantized(self, w: float, s: float, z: float) -> float:
        return min(max(float(round(float(np.float32(w) / np.float32(s)) + z)), self.low), self.high)

    def near_tie(self, w: float, s: float, z: float) -> bool:
        return halfway(w / s + z) and self.low - 1 < w / s + z < self.high + 1

    def norm(self, group: list[float], s: float, z: float) -> float:
        return sum(abs(w - (self.quantized(w, s, z) - z) * s) ** self.p for w in group)

    def step(self, group: list[float], s: float, z: float, beta: float) -> tuple[float, float]:
        """Return the scale and the real zero point after one iteration."""
        codes = [self.quantized(w, s, z) for w in group]
        left = []  # w - e
        for w, code in zip(group, codes, strict=True):
            away = w - s * (code - z)
            e = 0.0
            if away:
                e = math.copysign(max(abs(away) - abs(away) ** (self.p - 1) / beta, 0.0), away)
            self.nonzero_errors += e != 0
            left.append(w - e)
        if not self.symmetric:
            z = sum(code - t / s for code, t in zip(codes, left, strict=True)) / len(group)
            z = min(max(z, self.low), self.high)
        steps = [code - z for code in codes]
        fitted = sum(t * step for t, step in zip(left, steps, strict=True)) / sum(x * x for x in steps)
        return (fitted if fitted > 0 else s), z


@pytest.mark.cpu("the slow reference takes its powers on the CPU, whose last bits decide")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("p", "beta", "kappa"), [(0.7, 10.0, 1.01), (0.7, 1.0, 1.01), (0.4, 30.0, 1.2)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_the_published_splitting_done_slowly(bits, symmetric, p, beta, kappa, seed):
    """Each group keeps a grid from its path whose error is the least; of errors equal in fp32 it has any."""
    weight = outliers(seed)
    code = hqq(bits, 16, symmetric, lp_norm=p, beta=beta, kappa=kappa).weights(weight, None)
    slow = Splitting(weight, bits, 16, symmetric, p, beta, kappa, 20)
    assert slow.nonzero_errors or beta < 10
    assert len(slow.unsure) < 0.1 * len(slow.paths)
    zero = torch.zeros_like(code.scale) if symmetric else code.zero_point
    for number, kept in enumerate(zip(code.scale.flatten().tolist(), zero.flatten().tolist(), strict=True)):
        path = slow.paths[number]
        least = min(error for _, _, error in path[: slow.certain])
        assert number in slow.unsure or any(
            kept == (pytest.approx(s, rel=1e-4), z) for s, z, error in path if error <= least * (1 + 1e-5)
        )
    near = Integers(bits, 16, symmetric).nearest(weight)
    assert not torch.equal(code.scale, near.scale)
    assert lost(weight, code, p).sum() < lost(weight, near, p).sum()


@settings(deadline=None, max_examples=50)
@example(3, 8, False, torch.float32, 1, 0.75)
@given(
    st.integers(2, 8), st.sampled_from([8, 16, None]), st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 2**31), st.floats(0, 1),
)  # fmt: skip
def test_no_group_is_worse_than_round_to_nearest_and_zeros_stay_zero(
    bits, group_size, symmetric, dtype, seed, sparsity
):
    weight = outliers(seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < sparsity] = 0
    weight = weight.to(dtype)
    code = hqq(bits, group_size, symmetric).weights(weight, None)
    near = Integers(bits, group_size, symmetric).nearest(weight)
    assert (lost(weight, code) <= lost(weight, near) * (1 + 1e-5)).all()
    low, high = bounds(bits)
    assert code.codes.min() >= low and code.codes.max() <= high
    assert code.scale.dtype == dtype and (code.scale > 0).all()
    assert (code.dequantize()[weight == 0] == 0).all()
    assert code.scheme() == near.scheme()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.9), (3, 0.97), (4, 0.97)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_gains_where_weights_have_outliers(bits, share, symmetric):
    weight = outliers(0)
    near = Integers(bits, 32, symmetric).nearest(weight)
    code = hqq(bits, 32, symmetric).weights(weight, None)
    assert lost(weight, code).sum() < share * lost(weight, near).sum()


def test_a_weight_of_zeros_is_served():
    zeros = torch.zeros(4, 32, device=DEVICE)
    for symmetric in (True, False):
        assert torch.equal(hqq(4, 8, symmetric).weights(zeros, None).dequantize(), zeros)


def test_more_iterations_are_never_worse():
    weight = outliers(2)
    few, many = (hqq(3, 16, iterations=count).weights(weight, None) for count in (2, 20))
    assert (lost(weight, many) <= lost(weight, few) * (1 + 1e-5)).all()

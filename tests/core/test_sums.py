"""Running sums: those of `torch.cumsum`, of floats and of integers."""

import pytest
import torch

from stages.core.sums import order_running_sums, running_sum
from tests.card import on_card, pretended


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("to", [None, torch.int32, torch.float32])
@pytest.mark.parametrize("dim", [0, -1])
def test_sums_are_those_of_torch(dtype, to, dim):
    values = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, expected = running_sum(values, dim, dtype=to), values.cumsum(dim, dtype=to)
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    with pretended() as counts:
        there = running_sum(values.to(on_card(1).device), dim, dtype=to)
        floats = there.dtype.is_floating_point
        assert there.device == on_card(1).device and counts["waits"] == floats
    assert torch.equal(there.held, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_cuda_adds_floats_in_order():
    order_running_sums()
    torch.set_deterministic_debug_mode("error")
    values = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(values.cuda().cumsum(1).cpu(), values.cumsum(1))
    assert torch.equal((values > 0.5).cuda().cumsum(1).cpu(), (values > 0.5).cumsum(1))

"""Magnitude pruning: within a matrix, and one threshold for all, against plain sorts."""

from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.model.blocks import linears
from stages.pruning.magnitude import global_zeros
from tests import families
from tests.families import DEVICE
from tests.pruners import SPARSITY, InMemorySource, magnitude, slow_mask, weights, zeros_of

pytestmark = pytest.mark.device


@given(weights(), SPARSITY, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_within_a_matrix_ties_go_to_the_lower_flat_index(weight, sparsity, dtype):
    method = magnitude(sparsity, "matrix")
    count = zeros_of(method, *weight.shape)
    assert count == floor(weight.numel() * sparsity + 1e-6)
    mask = torch.tensor(slow_mask(weight.abs().flatten().tolist(), count), device=DEVICE).view_as(weight)
    expected = torch.where(mask, 0, weight).to(dtype)
    assert torch.equal(method.weights(weight.to(dtype), None, count), expected)


def test_a_pattern_whose_share_has_no_exact_decimal():
    for sparsity in (0.666667, 2 / 3):
        for scope in ("matrix", "row"):
            method = magnitude(sparsity, scope, structure="1:3")
            result = method.weights(torch.tensor([[1.0, -3, 2, 0.5, 0.4, 0.3]], device=DEVICE), None, 4)
            assert result.tolist() == [[0, -3, 0, 0.5, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("ties", [False, True])
def test_one_threshold_for_all_matrices_is_a_plain_sort(ties, sparsity, family, dtype):
    model = families.model(family).to(dtype)
    targets = linears(model)
    for number, linear in enumerate(targets):
        values = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(number)).to(DEVICE)
        # Values that share their upper 16 bits in fp32, so that the lower ones decide.
        values = (values * 4).round() / 4 if ties else values.sign() * (1 + values.abs() * 1e-4)
        linear.weight.copy_(values * (1 + number % 3))
    every = torch.cat([linear.weight.flatten() for linear in targets]).float().abs()
    count = floor(len(every) * sparsity + 1e-6)
    gone = torch.zeros(len(every), dtype=torch.bool, device=DEVICE)
    gone[every.sort(stable=True).indices[:count]] = True
    parts = gone.split([linear.weight.numel() for linear in targets])

    zeros = global_zeros(InMemorySource(model), (), sparsity)
    assert list(zeros) == [linear.name for linear in targets]
    assert sum(zeros.values()) == count
    method = magnitude(sparsity, "global")
    for linear, part in zip(targets, parts, strict=True):
        assert zeros[linear.name] == int(part.sum())
        result = method.weights(linear.weight, None, zeros[linear.name])
        assert torch.equal(result, linear.weight.masked_fill(part.view_as(linear.weight), 0))


def test_a_global_threshold_leaves_ignored_matrices_out():
    model = families.model("llama")
    zeros = global_zeros(InMemorySource(model), ("mlp.up_proj",), 0.5)
    assert not any("up_proj" in name for name in zeros) and len(zeros) == 12
    inside = sum(linear.weight.numel() for linear in linears(model, ("mlp.up_proj",)))
    assert sum(zeros.values()) == inside // 2

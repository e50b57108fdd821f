"""AWQ against the paper's search over kept activations, and its promises about zeros and errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.model.grid import Integers
from stages.quantization.awq import AWQ, Activations, channel_scale, inverse_power_of_two
from tests.families import DEVICE
from tests.pipeline import TEXT, dense, do, load, params, quantize, record

pytestmark = [pytest.mark.numerics, pytest.mark.device]
ONE = torch.ones((), device=DEVICE)
BLOCK = {**TEXT, "sequential": "block"}


def awq(**fields: Any) -> AWQ:
    settings = {"source": "base/x", "method": "awq", "bits": 4, "group_size": 8, "calibration": BLOCK}
    return AWQ.model_validate(settings | fields)


def problem(
    seed: int, tokens: int = 64, width: int = 32, outs: tuple[int, ...] = (12, 6)
) -> tuple[list[torch.Tensor], torch.Tensor, Activations]:
    """Draw weights and the inputs they share, with a few far larger channels; return the statistic too."""
    draw = torch.Generator().manual_seed(seed)
    inputs = (
        torch.randn(tokens, width, generator=draw).to(DEVICE)
        * torch.randn(width, generator=draw).to(DEVICE).mul(1.5).exp()
    )
    statistic = Activations(width, torch.device(DEVICE))
    statistic.add(inputs[: tokens // 2])
    statistic.add(inputs[tokens // 2 :])
    return [torch.randn(out, width, generator=draw).to(DEVICE) for out in outs], inputs, statistic


def unchanged(scale: torch.Tensor) -> torch.Tensor:
    return scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_the_papers(seed, symmetric):
    """Compute and compare the outputs of every candidate on the activations themselves.

    The candidates are AWQ's to the bit: a group's largest weight can be halfway between two codes.
    """
    weights, inputs, statistic = problem(seed)
    grid, wide = Integers(4, 8, symmetric), inputs.double()
    errors, scales = [], []
    for step in range(20):
        scale = channel_scale(statistic.magnitude(), step / 20)
        exact = wide.abs().mean(0) ** (step / 20)
        exact /= (exact.max() * exact.min()).sqrt()
        torch.testing.assert_close(scale.double(), exact, rtol=1e-5, atol=0)
        rounded = [grid.nearest(w * scale).dequantize() for w in weights]
        outputs = [
            (wide / scale) @ r.T.double() - wide @ w.T.double() for r, w in zip(rounded, weights, strict=True)
        ]
        errors.append(sum(float(lost.square().sum()) for lost in outputs))
        scales.append(scale)
    chosen = awq(symmetric=symmetric).scale(weights, statistic, unchanged)
    best = next(step for step in range(20) if torch.equal(scales[step], chosen))
    assert best > 0
    assert errors[best] <= min(errors) * (1 + 1e-4) < errors[0]


@pytest.mark.parametrize("width", [8, 192, 400])
def test_the_error_is_exact_at_every_width(width):
    (weight,), inputs, statistic = problem(5, width=width, outs=(6,))
    scale = torch.rand(width, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 0.5
    lost = awq().grid.nearest(weight * scale).dequantize() / scale - weight
    upper = statistic.matrix().triu()
    upper.diagonal().div_(2)
    expected = (inputs.double() @ lost.double().T).square().sum() * 2 / len(inputs)
    error = awq().output_error(weight, scale, upper, ONE)
    torch.testing.assert_close(error.double(), expected, rtol=1e-4, atol=0)
    assert awq().output_error(weight, scale, upper, ONE / 8) == error / 64


@pytest.mark.parametrize("exponent", [-90, -60, 63, 100, 120])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_choice_does_not_depend_on_the_size_of_the_weights(symmetric, exponent):
    """Squared, the errors of weights of 1e19 overflow fp32."""
    weights, _, statistic = problem(1)
    weights[0][0, :4] = torch.tensor([9.0, -9, 0.1, 0.2], device=DEVICE)
    sized = [weight * 2.0**exponent for weight in weights]
    method = awq(bits=3, symmetric=symmetric)
    chosen = method.scale(weights, statistic, unchanged)
    assert not torch.equal(chosen, torch.ones_like(chosen))
    assert torch.equal(method.scale(sized, statistic, unchanged), chosen)
    hessian = statistic.matrix()
    for weight, large in zip(weights, sized, strict=True):
        clipped = method.clipped(weight, hessian)
        assert not torch.equal(clipped, weight)
        assert torch.equal(method.clipped(large, hessian), clipped * 2.0**exponent)


def test_the_unit_of_errors_is_a_power_of_two():
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 0.3, 1.0, 5.0, 3e38], device=DEVICE)
    units = inverse_power_of_two(sizes)
    assert units.tolist() == [1, 2.0**126, 2.0**99, 2, 0.5, 0.125, 2.0**-126]
    assert torch.equal(inverse_power_of_two(sizes[3:].bfloat16()), units[3:])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans())
def test_never_behind_round_to_nearest(seed, bits, symmetric):
    weights, inputs, statistic = problem(seed)
    method = awq(bits=bits, symmetric=symmetric)
    scale = method.scale(weights, statistic, unchanged)
    assert (scale > 0).all()

    def error(by: torch.Tensor) -> float:
        errors = [method.grid.nearest(w * by).dequantize() / by - w for w in weights]
        return sum(float((inputs @ lost.T).square().sum()) for lost in errors)

    assert error(scale) <= error(torch.ones_like(scale)) * 1.001


def test_only_reachable_scales_are_tried():
    weights, _, statistic = problem(0)
    coarse = awq().scale(weights, statistic, lambda scale: 2.0 ** scale.log2().round())
    assert torch.equal(coarse.log2(), coarse.log2().round())
    assert coarse.unique().numel() > 1


def test_ties_take_the_lower_alpha_and_silent_inputs_a_scale_of_one():
    statistic = Activations(32, torch.device(DEVICE))
    statistic.add(torch.zeros(4, 32, device=DEVICE))
    assert torch.equal(
        awq().scale([torch.randn(4, 32).to(DEVICE)], statistic, unchanged), torch.ones(32, device=DEVICE)
    )
    _, inputs, heard = problem(1)
    assert torch.equal(
        awq().scale([torch.zeros(4, 32, device=DEVICE)], heard, unchanged), torch.ones(32, device=DEVICE)
    )
    mean = inputs.abs().mean(0)
    mean[5] = 0
    assert channel_scale(mean, 0.5).isfinite().all()
    assert channel_scale(mean, 0.5)[5] == channel_scale(mean, 0.5).min()


def test_the_statistic_follows_the_fold():
    _, inputs, statistic = problem(2)
    scale = torch.rand(32, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 0.5
    statistic.divide(scale)
    direct = Activations(32, torch.device(DEVICE))
    direct.add(inputs / scale)
    torch.testing.assert_close(statistic.matrix(), direct.matrix(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistic.magnitude(), direct.magnitude())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, None])
def test_clipping_lowers_the_error_of_every_group_by_itself(symmetric, group_size):
    (weight, _), inputs, statistic = problem(3)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3] = 0
    weight[0, :4] = torch.tensor([9.0, -9, 0.1, 0.2], device=DEVICE)
    plain = awq(bits=3, symmetric=symmetric, group_size=group_size)
    clipping = awq(bits=3, symmetric=symmetric, group_size=group_size, clip=True)
    before = plain.weights(weight, statistic).dequantize()
    after = clipping.weights(weight, statistic).dequantize()
    assert torch.equal(before, plain.grid.nearest(weight).dequantize())
    size = group_size or 32
    gained = 0
    for row in range(len(weight)):
        for at in range(0, 32, size):
            part = slice(at, at + size)
            lost = [
                float((inputs[:, part] @ (w - weight)[row, part]).square().sum()) for w in (before, after)
            ]
            assert lost[1] <= lost[0] * 1.001
            gained += lost[1] < lost[0] * 0.99
    assert gained
    assert not after[weight == 0].any()


def test_folding_needs_whole_blocks():
    with pytest.raises(
        ValidationError, match="sequential is linear, but scales are folded into whole blocks"
    ):
        awq(calibration=TEXT)


RECIPE = {"source": "base/tiny", "method": "awq", "bits": 4, "group_size": 32, "calibration": BLOCK}


def test_a_resumed_run_notes_the_same(workspace, monkeypatch):
    """Linears left unscaled in blocks that were finished before are noted too."""
    chosen = params("llama", {"quantize/a": RECIPE, "quantize/b": RECIPE})
    do(chosen, ["quantize/a"])
    scale, calls = AWQ.scale, []

    def killed(self: AWQ, *args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 4:  # the first scale of the second block
            raise KeyboardInterrupt
        return scale(self, *args)

    monkeypatch.setattr(AWQ, "scale", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(chosen, "b")
    quantize(chosen, "b")
    assert len(calls) == 7
    whole, resumed = record("quantize/a")["notes"], record("quantize/b")["notes"]
    assert whole["quantize/a"] == resumed["quantize/b"]
    assert len(whole["quantize/a"].pop("block_errors")["errors"]) == 2
    assert whole["quantize/a"] == {
        "bos": False,
        "quantized_linears": 14,
        "unscaled_linears": [f"model.layers.{i}.self_attn.o_proj" for i in range(2)],
    }
    files = [(workspace / f"data/models/quantize/{name}/model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_scale_that_cannot_be_folded_is_refused_by_linear(workspace, monkeypatch):
    monkeypatch.setattr(AWQ, "scale", lambda *_: torch.full((32,), torch.inf, device=DEVICE))
    message = (
        r"^model\.layers\.0\.self_attn\.q_proj, model\.layers\.0\.self_attn\.k_proj, "
        r"model\.layers\.0\.self_attn\.v_proj: folding in scales of inf to inf exceeds the range of "
    )
    with pytest.raises(Refusal, match=message):
        do(params("llama", {"quantize/a": RECIPE}))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_pruned_model_keeps_its_zeros(workspace, family):
    chosen = params(family, {
        "prune/wanda": {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT},
        "quantize/awq": {
            "source": "prune/wanda", "method": "awq", "bits": 4, "group_size": 32, "symmetric": False,
            "clip": True, "calibration": BLOCK,
        },
    })  # fmt: skip
    do(chosen)
    assert record("quantize/awq")["sparsity"] >= record("prune/wanda")["sparsity"]
    sparse, quantized = load("prune/wanda"), dense(load("quantize/awq"))
    for linear in linears(sparse):
        assert not quantized.get_submodule(linear.name).weight[linear.weight == 0].any()

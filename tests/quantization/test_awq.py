"""AWQ against the paper's search done by hand on activations, and what it promises of zeros and errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.model.grid import Integers
from stages.model.stream import Streamed
from stages.quantization.awq import AWQ, Activations, candidate, unit_of
from tests.pipeline import TEXT, dense, do, load, params, quantize, record

ONE = torch.ones(())
BLOCK = {**TEXT, "sequential": "block"}


def awq(**fields: Any) -> AWQ:
    given = {"source": "base/x", "method": "awq", "bits": 4, "group_size": 8, "calibration": BLOCK, **fields}
    return AWQ.model_validate(given)


def problem(
    seed: int, tokens: int = 64, width: int = 32, outs: tuple[int, ...] = (12, 6)
) -> tuple[list[torch.Tensor], torch.Tensor, Activations]:
    """Weights, the inputs they share, with a few channels far larger than the rest, and their statistic."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=draw) * torch.randn(width, generator=draw).mul(1.5).exp()
    statistic = Activations(width, torch.device("cpu"))
    statistic.add(inputs[: tokens // 2])
    statistic.add(inputs[tokens // 2 :])
    return [torch.randn(out, width, generator=draw) for out in outs], inputs, statistic


def same(scale: torch.Tensor) -> torch.Tensor:
    return scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_the_papers(seed, symmetric):
    """Slowly, with the activations kept, every candidate's outputs computed and compared."""
    weights, inputs, statistic = problem(seed)
    grid = Integers(4, 8, symmetric)
    mean = inputs.abs().mean(0)
    errors, tried = [], []
    for step in range(20):
        scale = mean ** (step / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        outputs = [(inputs / scale) @ grid.nearest(w * scale).dequantize().T - inputs @ w.T for w in weights]
        errors.append(sum(float(lost.square().sum()) for lost in outputs))
        tried.append(scale)
    best = min(range(20), key=errors.__getitem__)
    found = awq(symmetric=symmetric).scale(weights, statistic, same)
    torch.testing.assert_close(found, tried[best])
    assert best > 0
    assert errors[best] < errors[0]


@pytest.mark.parametrize("width", [8, 192, 400])
def test_the_error_is_exact_at_every_width(width):
    (weight,), inputs, statistic = problem(5, width=width, outs=(6,))
    scale = torch.rand(width) + 0.5
    lost = awq().grid.nearest(weight * scale).dequantize() / scale - weight
    upper = statistic.matrix().triu()
    upper.diagonal().div_(2)
    expected = (inputs.double() @ lost.double().T).square().sum() * 2 / len(inputs)
    torch.testing.assert_close(awq()._error(weight, scale, upper, ONE).double(), expected, rtol=1e-4, atol=0)
    eighth = awq()._error(weight, scale, upper, ONE / 8)
    assert eighth == awq()._error(weight, scale, upper, ONE) / 64


@pytest.mark.parametrize("exponent", [-90, -60, 63, 100, 120])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_choice_does_not_depend_on_the_size_of_the_weights(symmetric, exponent):
    """Errors of weights of 1e19 are more than fp32 holds when squared."""
    weights, _, statistic = problem(1)
    weights[0][0, :4] = torch.tensor([9.0, -9, 0.1, 0.2])
    sized = [weight * 2.0**exponent for weight in weights]
    method = awq(bits=3, symmetric=symmetric)
    chosen = method.scale(weights, statistic, same)
    assert not torch.equal(chosen, torch.ones_like(chosen))
    assert torch.equal(method.scale(sized, statistic, same), chosen)
    hessian = statistic.matrix()
    for weight, large in zip(weights, sized, strict=True):
        clipped = method.clipped(weight, hessian)
        assert not torch.equal(clipped, weight)
        assert torch.equal(method.clipped(large, hessian), clipped * 2.0**exponent)


def test_a_unit_is_a_power_of_two():
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 0.3, 1.0, 5.0, 3e38])
    units = unit_of(sizes)
    assert units.tolist() == [1, 2.0**126, 2.0**99, 2, 0.5, 0.125, 2.0**-126]
    assert torch.equal(unit_of(sizes[3:].bfloat16()), units[3:])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans())
def test_never_behind_round_to_nearest(seed, bits, symmetric):
    weights, inputs, statistic = problem(seed)
    method = awq(bits=bits, symmetric=symmetric)
    scale = method.scale(weights, statistic, same)
    assert (scale > 0).all()

    def error(by: torch.Tensor) -> float:
        made = [method.grid.nearest(w * by).dequantize() / by - w for w in weights]
        return sum(float((inputs @ lost.T).square().sum()) for lost in made)

    assert error(scale) <= error(torch.ones_like(scale)) * 1.001


def test_only_what_the_feed_can_hold_is_tried():
    weights, _, statistic = problem(0)
    coarse = awq().scale(weights, statistic, lambda scale: 2.0 ** scale.log2().round())
    assert torch.equal(coarse.log2(), coarse.log2().round())
    assert coarse.unique().numel() > 1


def test_ties_take_the_lower_alpha_and_silence_takes_one():
    statistic = Activations(32, torch.device("cpu"))
    statistic.add(torch.zeros(4, 32))
    assert torch.equal(awq().scale([torch.randn(4, 32)], statistic, same), torch.ones(32))
    _, inputs, heard = problem(1)
    assert torch.equal(awq().scale([torch.zeros(4, 32)], heard, same), torch.ones(32))
    mean = inputs.abs().mean(0)
    mean[5] = 0
    assert candidate(mean, 0.5).isfinite().all()
    assert candidate(mean, 0.5)[5] == candidate(mean, 0.5).min()


def test_the_statistic_follows_the_fold():
    _, inputs, statistic = problem(2)
    scale = torch.rand(32) + 0.5
    statistic.divide(scale)
    direct = Activations(32, torch.device("cpu"))
    direct.add(inputs / scale)
    torch.testing.assert_close(statistic.matrix(), direct.matrix(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistic.magnitude(), direct.magnitude())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, None])
def test_clipping_lowers_the_error_of_every_group_by_itself(symmetric, group_size):
    (weight, _), inputs, statistic = problem(3)
    weight[torch.rand(weight.shape) < 0.3] = 0
    weight[0, :4] = torch.tensor([9.0, -9, 0.1, 0.2])
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


def test_a_scale_needs_blocks_as_a_whole():
    with pytest.raises(ValidationError, match="sequential is linear; a scale is folded into a block"):
        awq(calibration=TEXT)


def test_killed_and_gone_on_it_notes_the_same(workspace, monkeypatch):
    """What was left unscaled in blocks finished before is noted too."""
    told = {"source": "base/tiny", "method": "awq", "bits": 4, "group_size": 32, "calibration": BLOCK}
    chosen = params("llama", {"quantize/a": told, "quantize/b": told})
    do(chosen, ["quantize/a"])
    write, calls = Streamed._write, []

    def killed(self: Streamed, *args: Any) -> None:
        calls.append(args[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(Streamed, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(chosen, "b")
    quantize(chosen, "b")
    assert len(calls) == 3
    whole, resumed = record("quantize/a")["notes"], record("quantize/b")["notes"]
    assert whole["quantize/a"] == resumed["quantize/b"]
    assert whole["quantize/a"] == {
        "quantized_linears": 14,
        "unscaled_linears": [f"model.layers.{i}.self_attn.o_proj" for i in range(2)],
    }
    files = [(workspace / f"data/models/quantize/{name}/model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_scale_that_cannot_be_folded_is_refused_by_linear(workspace, monkeypatch):
    told = {"source": "base/tiny", "method": "awq", "bits": 4, "group_size": 32, "calibration": BLOCK}
    monkeypatch.setattr(AWQ, "scale", lambda *_: torch.full((32,), torch.inf))
    said = (
        r"^model\.layers\.0\.self_attn\.q_proj, model\.layers\.0\.self_attn\.k_proj, "
        r"model\.layers\.0\.self_attn\.v_proj: folding scales of inf to inf into it leaves the range of "
    )
    with pytest.raises(Refusal, match=said):
        do(params("llama", {"quantize/a": told}))


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
    sparse, made = load("prune/wanda"), dense(load("quantize/awq"))
    for linear in linears(sparse):
        assert not made.get_submodule(linear.name).weight[linear.weight == 0].any()

"""SmoothQuant: the formula by hand, and the output of the loaded model with its inputs rounded as well."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.quantization.smoothquant import InputPeak, SmoothQuant
from tests.pipeline import NONE, TEXT, do, load, params, record

pytestmark = [pytest.mark.numerics, pytest.mark.device]
BLOCK = {**TEXT, "sequential": "block"}
RECIPE = {"source": "base/tiny", "method": "smoothquant", "calibration": BLOCK}


def smoothquant(**fields: Any) -> SmoothQuant:
    return SmoothQuant.model_validate({**RECIPE, **fields})


def peak(inputs: torch.Tensor) -> InputPeak:
    statistic = InputPeak(inputs.shape[1], inputs.device)
    for part in inputs.split(5):
        statistic.add(part)
    return statistic


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scale_is_the_papers(alpha, device):
    inputs = torch.randn(23, 8).to(device) * torch.tensor([1, 100, 1, 1, 0.01, 1, 1, 1], device=device)
    weights = [torch.randn(6, 8).to(device), torch.randn(3, 8).to(device)]
    inputs[:, 6] = 0
    weights[0][:, 7] = weights[1][:, 7] = 0
    scale = smoothquant(alpha=alpha).scale(weights, peak(inputs), lambda scale: scale)
    for j in range(6):
        largest = max(float(w[:, j].abs().max()) for w in weights)
        expected = float(inputs[:, j].abs().max()) ** alpha / largest ** (1 - alpha)
        assert float(scale[j]) == pytest.approx(expected)
    assert scale[6:].tolist() == [1, 1]
    if alpha == 0.5:  # the peaks of inputs and weights have become equal
        balanced = torch.cat(weights).abs().amax(0) * scale
        torch.testing.assert_close((inputs.abs().amax(0) / scale)[:6], balanced[:6])


def test_rows_are_rounded_to_eight_bits_and_zeros_stay(device):
    weight = torch.randn(6, 32)
    weight[torch.rand(6, 32) < 0.4] = 0
    weight, inputs = weight.to(device), torch.randn(4, 32).to(device)
    code = smoothquant().weights(weight, peak(inputs))
    step = weight.abs().amax(1, keepdim=True) / 127.5
    assert ((code.dequantize() - weight).abs() <= step * 0.501).all()
    torch.testing.assert_close(code.scale, step)  # to the last bit on some devices only
    assert torch.equal(code.codes, (weight / code.scale).round().clamp(-128, 127).to(torch.int8))
    assert not code.codes[weight == 0].any()


def test_settings_other_than_w8a8_are_refused():
    for wrong in ({"bits": 4}, {"group_size": 32}, {"alpha": 1.5}, {"calibration": TEXT}):
        with pytest.raises(ValidationError):
            smoothquant(**wrong)


def rounded(inputs: torch.Tensor) -> torch.Tensor:
    """Round inputs to 8 bits, one scale per token of `[windows, tokens, in]`, one for all of `[tokens, in]`.

    In their own dtype throughout, as the model does.
    """
    size = inputs.abs().amax(-1, keepdim=True) if inputs.ndim == 3 else inputs.abs().max()
    scale = size / 127.5
    return (inputs / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt_neox"])
def test_the_loaded_model_rounds_its_inputs_too(family, workspace):
    do(params(family, {"quantize/w8a8": RECIPE}))
    stored = load_file(Path("data/models/quantize/w8a8/model.safetensors"))
    loaded, base = load("quantize/w8a8"), load("base/tiny")
    tokens = torch.arange(40)[None]
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    handles = [
        linear.module.register_forward_hook(
            lambda module, args, output, name=linear.name: seen.append((name, args[0], output))
        )
        for linear in linears(loaded, partial=True)
    ]
    with torch.no_grad():
        logits = loaded(input_ids=tokens).logits
    for handle in handles:
        handle.remove()
    assert len(seen) == len(linears(base))
    for name, inputs, output in seen:
        codes = stored[f"{name}.weight"]
        assert codes.dtype == torch.int8
        module = loaded.get_submodule(name)
        weight = (codes.float() * stored[f"{name}.weight_scale"].float()).to(inputs.dtype)
        assert torch.equal(output, torch.nn.functional.linear(rounded(inputs), weight, module.bias))
        assert not torch.equal(output, torch.nn.functional.linear(inputs, weight, module.bias))
    flat = [name for name, inputs, _ in seen if inputs.ndim == 2]
    assert record("quantize/w8a8")["notes"]["quantize/w8a8"]["inputs_share_a_scale"] == flat
    assert len(flat) == (4 if family == "opt" else 0)
    with torch.no_grad():
        plain = base(input_ids=tokens).logits
    assert float((logits - plain).float().norm() / plain.float().norm()) < 0.05

    dense = AutoModelForCausalLM.from_pretrained("data/models/quantize/w8a8").eval()
    with torch.no_grad():
        assert torch.equal(dense(input_ids=tokens).logits, logits)


def test_a_family_whose_linears_no_format_knows_is_refused(workspace):
    with pytest.raises(Refusal, match=r"smoothquant does not serve gpt2, .*: no format runs Conv1D"):
        do(params("gpt2", {"quantize/w8a8": RECIPE}))


def test_later_stages_start_from_the_values_of_its_codes(workspace):
    half = {"source": "quantize/w8a8", "method": "magnitude", "sparsity": 0.5, "scope": "matrix"}
    chosen = params("llama", {"quantize/w8a8": RECIPE, "prune/half": {**half, "calibration": NONE}})
    do(chosen, ["quantize/w8a8", "prune/half"])
    stored = load_file(Path("data/models/quantize/w8a8/model.safetensors"))
    pruned = load("prune/half")
    for linear in linears(pruned):
        codes, scale = stored[f"{linear.name}.weight"], stored[f"{linear.name}.weight_scale"]
        weight = (codes.float() * scale.float()).to(scale.dtype)
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], weight[kept])
        assert kept.sum() == kept.numel() / 2
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(pruned.get_parameter(norm), stored[norm])

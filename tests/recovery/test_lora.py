"""LoRA under a mask: the trained weights are merged as they are, and a zero stays a zero."""

from pathlib import Path

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from stages.model.blocks import linears
from stages.recovery.freezing import trainable_mask
from stages.recovery.masked import MaskedLinear
from tests import families
from tests.recipes import LORA, WANDA
from tests.recipes import run as run_stages
from tests.tuned import recipe, tune, windows

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def sparse(family: str) -> torch.nn.Module:
    model = families.model(family)
    for linear in linears(model):
        linear.weight[torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    return model


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_trained_weights_are_merged_and_zeros_are_kept(family, monkeypatch):
    model = sparse(family)
    zeros = {x.name: x.weight == 0 for x in linears(model)}
    rest = {n: p.clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in zeros}
    trained = {}
    merge = peft.tuners.lora.LoraModel.merge_and_unload

    def watched(self, *args, **kwargs):
        with torch.no_grad():
            trained["logits"] = self.eval()(input_ids=windows()).logits
        return merge(self, *args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", watched)
    recovered, points = tune(recipe("lora"), model)
    merged = recovered.model
    with torch.no_grad():
        assert torch.equal(merged(input_ids=windows()).logits, trained["logits"])
    assert points[-1].heldout_loss < points[0].heldout_loss - 0.01
    assert len(linears(merged)) == len(zeros)
    for linear in linears(merged):
        assert zeros[linear.name].any() and (linear.weight[zeros[linear.name]] == 0).all()
        stored = zeros[linear.name].T if linear.transposed else zeros[linear.name]
        assert torch.equal(recovered.zeros[linear.name], stored)
    for name, value in rest.items():
        assert torch.equal(merged.get_parameter(name), value), name
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_an_update_is_oriented_as_the_weight_is_stored(shape):
    torch.manual_seed(0)
    base = Conv1D(shape[1], shape[0])  # stored [in, out]
    base.weight.data[0] = 0
    layer = MaskedLinear(
        base, "default", config=peft.LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=True), r=2, lora_alpha=4
    )
    layer.trainable_mask = trainable_mask(base.weight == 0)
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data.normal_()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (2 * up @ down).T * (base.weight != 0)
    assert torch.allclose(layer.get_delta_weight("default"), expected)
    inputs = torch.randn(3, shape[0])
    torch.testing.assert_close(layer(inputs), inputs @ (base.weight + expected) + base.bias)


def test_the_same_seed_gives_the_same_bytes_and_another_others():
    models = [tune(recipe("lora", seed=seed, steps=3), sparse("llama"))[0].model for seed in (0, 0, 1)]
    states = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_two_runs_of_the_stage_give_the_same_bytes(workspace):
    contents = []
    for _ in range(2):
        _, last = run_stages("llama", ("prune", WANDA), ("finetune", LORA))
        contents.append((Path("data/models") / last / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]

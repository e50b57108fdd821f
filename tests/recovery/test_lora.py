"""LoRA under a mask: the trained weights are merged as they are, and a zero stays a zero."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from stages.model.blocks import linears
from stages.recovery.freezing import trainable_mask
from stages.recovery.masked import MaskedLinear
from tests import families
from tests.recipes import LORA, WANDA
from tests.recipes import run as run_stages
from tests.tuned import recipe, run, tune, windows

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def sparse(family: str) -> torch.nn.Module:
    model = families.model(family)
    for linear in linears(model):
        drawn = torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(1))
        linear.weight[drawn.to(linear.weight.device) < 0.5] = 0
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


def deep(blocks: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=256, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def allocated(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What `work` returns, the bytes it left allocated, and the most it had at a time."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        result = work()
        gc.collect()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return result, now, most


def trained(model: torch.nn.Module, **options: Any) -> tuple[Any, int, int]:
    """`allocated` of a training of one step."""
    chosen = recipe("lora", steps=1, evaluate_at=(1,), **options)

    def work() -> Any:
        arm = chosen.arm(model, None)
        run(chosen, arm)
        return arm

    return allocated(work)


@pytest.mark.parametrize("keep", ["mask", "none"])
def test_only_adapters_have_gradients_wide_copies_and_moments(keep):
    """In bytes: four numbers of fp32 an adapter's weight, and a mask of a byte a weight of the base."""
    model = deep(2)
    matrices = sum(linear.weight.numel() for linear in linears(model))
    arm, held, _ = trained(model, keep=keep)
    adapters = arm.trained()
    assert all("lora" in name for name in adapters)
    frozen = {name: p for name, p in arm.model.named_parameters() if name not in adapters}
    assert len(frozen) == len(list(deep(2).parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in frozen.values())
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    assert set(arm.state()) == {
        f"{name}.{kind}" for name in adapters for kind in ("master", "step", "exp_avg", "exp_avg_sq")
    }
    expected = 16 * sum(p.numel() for p in adapters.values()) + (matrices if keep == "mask" else 0)
    assert 0 <= held - expected <= 8 * len(adapters)


def test_checkpointed_activations_are_those_of_a_block_not_of_all():
    """From 2 blocks to 4, the peak grows by what each block adds for good, and by its inputs."""
    growth = {}
    for checkpointed in (False, True):
        peaks = [trained(deep(blocks), gradient_checkpointing=checkpointed)[2] for blocks in (2, 4)]
        growth[checkpointed] = (peaks[1] - peaks[0]) // 2
    block = deep(1).model.layers[0]
    matrices = [p for p in block.parameters() if p.ndim == 2]
    adapters = 4 * sum(sum(p.shape) for p in matrices)  # of rank 4
    stays = 16 * adapters + sum(p.numel() for p in matrices)
    inputs = 2 * windows()[:4].numel() * 64
    assert growth[True] <= stays + inputs
    assert growth[False] > growth[True] + 10 * inputs

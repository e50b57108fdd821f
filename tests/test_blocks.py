"""The walk: which linears it finds, what they are grouped by, and that each statistic is the honest one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from stages.core.blocks import blocks, input_groups, linears, walk
from stages.core.errors import Refusal
from stages.core.statistics import ColumnNorm, Hessian
from tests import families

_GATED = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
GROUPS = {
    "llama": _GATED,
    "qwen3": _GATED,
    "gemma3": _GATED,
    "mistral": _GATED,
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
    "gpt_neox": [
        ["attention.query_key_value"],
        ["attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}
FAMILIES = list(families.CONFIGS)


def windows(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def halve(name: str, weight: torch.Tensor, statistic: object) -> torch.Tensor:
    """A compression that changes every weight visibly: coarse rounding."""
    return (weight * 32).round() / 32


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_family_is_here():
    assert len(FAMILIES) == 7
    assert set(GROUPS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_and_what_they_share(family):
    model = families.model(family)
    found = linears(model)
    names = [name for name, _ in blocks(model)]
    assert len(names) == 2
    shared: dict[int, set[str]] = {}
    for name, group in input_groups(model, found).items():
        shared.setdefault(group, set()).add(name)
    expected = [{f"{block}.{name}" for name in group} for block in names for group in GROUPS[family]]
    assert sorted(map(sorted, shared.values())) == sorted(map(sorted, expected))
    assert {linear.name for linear in found} == set().union(*expected)
    assert sorted({linear.weight.shape[1] for linear in found}) == families.IN_FEATURES[family]
    assert all(linear.transposed == isinstance(linear.module, Conv1D) for linear in found)
    assert all(linear.transposed for linear in found) == (family == "gpt2")
    assert hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
def test_statistics_are_those_of_inputs_already_compressed_upstream(family, kind):
    tokens, taken = windows(), {}

    def note(name, weight, statistic):
        taken[name] = statistic.norm() if kind is ColumnNorm else statistic.matrix()
        assert statistic.num_tokens == tokens.numel()
        return halve(name, weight, statistic)

    walked = families.model(family)
    assert walk(walked, note, windows=tokens, statistic=kind) == len(taken) == len(linears(walked))
    assert hooks(walked) == 0

    # One plain forward a group, on a model in which every group before it is compressed and none after.
    slow = families.model(family)
    modules = {linear.name: linear for linear in linears(slow)}
    for block, _ in blocks(slow):
        for group in GROUPS[family]:
            seen: dict[str, torch.Tensor] = {}
            handles = [
                modules[f"{block}.{name}"].module.register_forward_hook(
                    lambda module, args, output, name=name, seen=seen: seen.update({name: args[0]})
                )
                for name in group
            ]
            with torch.no_grad():
                slow(input_ids=tokens, use_cache=False)
            for handle in handles:
                handle.remove()
            for name in group:
                inputs = seen[name].reshape(-1, seen[name].shape[-1]).double()
                assert len(inputs) == tokens.numel()
                direct = (
                    inputs.square().mean(0).sqrt()
                    if kind is ColumnNorm
                    else 2 / len(inputs) * inputs.T @ inputs
                )
                torch.testing.assert_close(taken[f"{block}.{name}"].double(), direct, rtol=1e-4, atol=1e-6)
                linear = modules[f"{block}.{name}"]
                linear.weight.copy_(halve(name, linear.weight, None))
    for name, parameter in walked.named_parameters():
        assert torch.equal(parameter, slow.get_parameter(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_handed_over_as_out_by_in(family):
    model = families.model(family)
    shapes = {}

    def note(name, weight, statistic):
        shapes[name] = tuple(weight.shape)
        assert statistic is None
        return weight * 0

    assert walk(model, note) == len(shapes)
    for linear in linears(model):
        stored = tuple(linear.module.weight.shape)
        assert shapes[linear.name] == (stored[::-1] if linear.transposed else stored)
        assert not linear.module.weight.any()


def test_one_statistic_a_group():
    seen = {}
    walk(
        families.model("llama"),
        lambda name, weight, statistic: seen.setdefault(name, statistic) and weight,
        windows=windows(),
        statistic=ColumnNorm,
    )
    at = "model.layers.1"
    assert seen[f"{at}.self_attn.q_proj"] is seen[f"{at}.self_attn.v_proj"]
    assert seen[f"{at}.mlp.gate_proj"] is seen[f"{at}.mlp.up_proj"]
    assert len({id(statistic) for statistic in seen.values()}) == 8


def test_what_is_ignored_keeps_its_weights():
    model, before = families.model("llama"), families.model("llama")
    ignore = ("self_attn.v_proj", "mlp.down_proj")
    assert walk(model, halve, windows=windows(), statistic=Hessian, ignore=ignore) == 10
    for linear, old in zip(linears(model), linears(before), strict=True):
        assert torch.equal(linear.weight, old.weight) == linear.name.endswith(ignore)


def test_a_misspelt_ignore_is_refused():
    with pytest.raises(
        Refusal, match=r"ignore names no matrix of a block: mlp\.gate; there are .*mlp\.gate_proj"
    ):
        linears(families.model("llama"), ("mlp.gate",))


def mixture() -> torch.nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**families._GATED, num_local_experts=2, num_experts_per_tok=1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_the_experts_of_a_mixture_are_refused_by_name():
    model = mixture()
    with pytest.raises(Refusal) as refusal:
        linears(model)
    stacked = [n for n, p in model.named_parameters() if p.ndim == 3]
    assert stacked
    for name in stacked:
        assert name in str(refusal.value)


def test_the_experts_of_a_mixture_may_be_left_alone():
    model, before = mixture(), mixture()
    inside = {
        name.split(".", 3)[3]
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.ndim >= 2 and ".self_attn." not in name
    }
    modules = dict(blocks(model)[0][1].named_modules())
    ignore = tuple(
        n.removesuffix(".weight")
        if isinstance(modules.get(n.removesuffix(".weight")), torch.nn.Linear)
        else n
        for n in sorted(inside)
    )
    assert walk(model, halve, windows=windows(), statistic=Hessian, ignore=ignore) == 8
    for name, parameter in before.named_parameters():
        changed = ".self_attn." in name and parameter.ndim == 2
        assert torch.equal(parameter, model.get_parameter(name)) != changed, name


def test_a_matrix_added_to_a_block_is_refused_by_name():
    model = families.model("llama")
    blocks(model)[1][1].mlp.gates = torch.nn.Parameter(torch.zeros(2, 8, 8))
    with pytest.raises(Refusal, match=r"model\.layers\.1\.mlp\.gates \(2, 8, 8\)"):
        walk(model, halve)


def test_a_linear_the_forward_never_reaches_is_refused():
    model = families.model("llama")
    blocks(model)[0][1].spare = torch.nn.Linear(4, 4)
    with pytest.raises(Refusal, match=r"never reaches model\.layers\.0\.spare"):
        walk(model, halve, windows=windows(), statistic=ColumnNorm)
    assert hooks(model) == 0


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(Refusal, match="T5ForConditionalGeneration is an encoder-decoder"):
        linears(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("statistic", [None, ColumnNorm])
def test_broken_weights_are_refused_by_name_before_anything_changes(broken, statistic):
    model = families.model("qwen3")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = broken
    with pytest.raises(Refusal, match=r"NaN or infinite weights in model\.layers\.1\.mlp\.up_proj;"):
        walk(model, halve, windows=windows(), statistic=statistic)
    for name, parameter in model.named_parameters():
        assert name == "model.layers.1.mlp.up_proj.weight" or torch.equal(parameter, before[name])


def test_broken_inputs_are_refused_by_name_and_leave_no_hook():
    model = families.model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(Refusal, match=r"model\.layers\.1\.mlp\.gate_proj: NaN or infinite inputs"):
        walk(model, halve, windows=windows(), statistic=ColumnNorm)
    assert hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_longer_than_the_model_reads_are_refused(family):
    with pytest.raises(Refusal, match=r"sequence_length 257 is more than the 256 tokens the model reads"):
        walk(families.model(family), halve, windows=windows(1, 257), statistic=ColumnNorm)


def test_a_refusal_of_the_method_names_the_linear():
    def refuse(name, weight, statistic):
        raise Refusal("no such thing.")

    with pytest.raises(Refusal, match=r"^prune x: model\.layers\.0\.self_attn\.q_proj: no such thing\."):
        walk(families.model("llama"), refuse, label="prune x")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_is_made_on_a_device_of_its_own_choosing(family):
    """With another default device, a tensor made without naming the weight's device could not mix with it."""
    model, tokens = families.model(family), windows()
    torch.set_default_device("meta")
    try:
        walk(model, halve, windows=tokens, statistic=Hessian)
    finally:
        torch.set_default_device(None)
    assert {p.device.type for p in model.parameters()} == {"cpu"}

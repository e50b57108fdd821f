"""The walk: what linears share, that each statistic has seen what it says, and what is refused by name."""

import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from stages.compress.causal import by_queries
from stages.compress.statistics import ColumnNorm, Hessian, Statistic
from stages.compress.walk import Group, walk
from stages.core.errors import Refusal
from stages.model.blocks import Linear, blocks, linears
from stages.pruning.sparsegpt import SparseGPT
from tests import families
from tests.test_blocks import mixture

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
MODES = [
    ("linear", None),
    ("linear", 1),
    ("linear", 2),
    ("block", None),
    ("block", 1),
    ("block", 2),
    ("none", None),
    ("none", 2),
]


def windows(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def coarse(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 32).round() / 32


def halve(linear: Linear, statistic: Statistic | None) -> torch.Tensor:
    """A compression that changes every weight visibly: coarse rounding."""
    return coarse(linear.weight)


def hooks(model: torch.nn.Module) -> int:
    replaced = sum("forward" in vars(module) for module in model.modules())
    return replaced + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def inputs_of(model: torch.nn.Module, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the linears of these full names are handed in one plain forward, `[tokens, in]` fp64."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: args[0]})
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: seen[name].reshape(-1, seen[name].shape[-1]).double() for name in names}


def honest(family: str, sequential: str, tokens: torch.Tensor) -> tuple[dict, torch.nn.Module]:
    """The inputs each mode promises, by plain forwards of a model that is compressed step by step."""
    model, seen = families.model(family), {}
    for block, _ in blocks(model):
        steps = (
            GROUPS[family] if sequential == "linear" else [[one for group in GROUPS[family] for one in group]]
        )
        for step in steps:
            names = [f"{block}.{name}" for name in step]
            watched = families.model(family) if sequential == "none" else model
            with torch.no_grad(), by_queries():
                seen |= inputs_of(watched, names, tokens)
            for linear in (one for one in linears(model) if one.name in names):
                linear.weight.copy_(coarse(linear.weight))
    return seen, model


def test_every_family_has_its_groups():
    assert set(GROUPS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_linears_share(family):
    model, found = families.model(family), {}

    def note(groups: list[Group], run: object) -> None:
        block = groups[0].linears[0].block
        found[block] = [
            [linear.name.removeprefix(f"{block}.") for linear in group.linears] for group in groups
        ]
        for group in groups:
            assert group.inputs.numel() == 24 * group.linears[0].weight.shape[1]
            assert isinstance(group.statistic, ColumnNorm)
            name = next((n for n, m in model.named_modules() if m is group.feeder), "")
            first = group.linears[0].name.rpartition(".")[2]
            assert ("norm" in name or "ln_" in name) == (group in (groups[0], groups[2])), (first, name)

    walk(
        model, halve, windows=windows(), statistic=ColumnNorm, sequential="block", batch_size=1, prepare=note
    )
    assert found == {block: GROUPS[family] for block, _ in blocks(model)}
    assert hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
@pytest.mark.parametrize(("sequential", "batch_size"), MODES)
def test_statistics_have_seen_what_the_mode_promises(sequential, batch_size, kind, family):
    tokens, taken = windows(), {}

    def note(linear: Linear, statistic: Statistic) -> torch.Tensor:
        taken[linear.name] = statistic.norm() if kind is ColumnNorm else statistic.matrix()
        assert statistic.num_tokens == tokens.numel()
        return coarse(linear.weight)

    walked = families.model(family)
    done = walk(walked, note, windows=tokens, statistic=kind, sequential=sequential, batch_size=batch_size)
    assert done == len(taken) == len(linears(walked))
    assert hooks(walked) == 0

    seen, slow = honest(family, sequential, tokens)
    assert seen.keys() == taken.keys()
    # A forward of fewer windows at a time may round bf16 otherwise, and what follows with it.
    rtol = 1e-4 if batch_size is None else 0.05
    for name, inputs in seen.items():
        assert len(inputs) == tokens.numel()
        direct = inputs.square().mean(0).sqrt() if kind is ColumnNorm else 2 / len(inputs) * inputs.T @ inputs
        atol = 1e-6 if batch_size is None else 0.02 * float(direct.abs().max())
        torch.testing.assert_close(taken[name].double(), direct, rtol=rtol, atol=atol)
    for name, parameter in walked.named_parameters():
        assert torch.equal(parameter, slow.get_parameter(name)), name


BIASED = {
    "bloom": BloomConfig(vocab_size=families.VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(vocab_size=families.VOCAB, d_model=32, n_layers=2, n_heads=4),
}
"""Families that hand their blocks positions by head: a row a window and head, or a row a head."""


@pytest.mark.parametrize("family", [*FAMILIES, *BIASED])
@pytest.mark.parametrize("sequential", ["linear", "none"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_leaves_a_block_in_pieces_is_what_leaves_it_whole(family, sequential, size):
    """In fp32, where how many windows are computed at once changes no more than the last digits.

    There are as many windows as heads, which no shape tells apart.
    """
    torch.manual_seed(0)
    if family in BIASED:
        model = AutoModelForCausalLM.from_config(BIASED[family]).eval()
    else:
        model = families.model(family).float()
    leaving = []
    handle = blocks(model)[-1][1].register_forward_hook(
        lambda module, args, output: leaving.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=windows(4), use_cache=False)
    walk(
        model, lambda linear, statistic: None, windows=windows(4), statistic=ColumnNorm,
        sequential=sequential, batch_size=size,
    )  # fmt: skip
    handle.remove()
    whole, pieces = leaving
    assert whole.shape == pieces.shape == (4, 24, 32)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_no_more_windows_than_asked_for_are_inside_a_block(size):
    model, rows = families.model("llama"), []
    for linear in linears(model):
        linear.module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    walk(model, halve, windows=windows(), statistic=Hessian, sequential="block", batch_size=size)
    assert max(rows) == size


def test_a_refusal_in_the_middle_of_a_block_leaves_no_batch_waiting():
    model = families.model("llama")

    def refuse(linear: Linear, statistic: Statistic) -> None:
        if linear.name.endswith("o_proj"):
            raise Refusal("enough.")

    with pytest.raises(Refusal, match=r"o_proj: enough\."):
        walk(model, refuse, windows=windows(), statistic=ColumnNorm, sequential="linear", batch_size=1)
    assert hooks(model) == 0
    assert torch.is_grad_enabled()
    with torch.no_grad():
        model(input_ids=windows())


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_one_statistic_a_group_and_none_is_kept(sequential):
    seen: dict[str, weakref.ref[Statistic]] = {}
    alive = []

    def note(linear: Linear, statistic: Statistic) -> None:
        seen[linear.name] = weakref.ref(statistic)
        alive.append(len({id(reference()) for reference in seen.values() if reference()}))
        for group in GROUPS["llama"]:
            mates = [f"{linear.block}.{name}" for name in group]
            if linear.name in mates:
                assert all(seen[mate]() is statistic for mate in mates if mate in seen)

    walk(families.model("llama"), note, windows=windows(), statistic=Hessian, sequential=sequential)
    assert len(seen) == 14
    assert all(reference() is None for reference in seen.values())
    assert max(alive) == 1


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_what_is_ignored_keeps_its_weights(sequential):
    model, before = families.model("llama"), families.model("llama")
    ignore = ("self_attn.v_proj", "mlp.down_proj")
    done = walk(model, halve, windows=windows(), statistic=Hessian, ignore=ignore, sequential=sequential)
    assert done == 10
    for linear, old in zip(linears(model), linears(before), strict=True):
        assert torch.equal(linear.weight, old.weight) == linear.name.endswith(ignore)


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


def test_a_linear_the_forward_never_reaches_is_refused():
    model = families.model("llama")
    blocks(model)[0][1].spare = torch.nn.Linear(4, 4)
    with pytest.raises(Refusal, match=r"never reaches model\.layers\.0\.spare"):
        walk(model, halve, windows=windows(), statistic=ColumnNorm)
    assert hooks(model) == 0


class Twice(torch.nn.Module):
    """A norm that passes through a linear two times."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm, self.spare = norm, torch.nn.Linear(32, 32, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.spare(self.spare(x))


class Routed(torch.nn.Module):
    """A norm beside a linear to which no token is routed."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm, self.expert = norm, torch.nn.Linear(32, 32, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.expert(x.reshape(-1, 32)[:0])
        return self.norm(x)


def test_a_linear_passed_through_twice_is_refused():
    model = families.model("llama")
    block = blocks(model)[1][1]
    block.input_layernorm = Twice(block.input_layernorm)
    with pytest.raises(Refusal, match=r"layers\.1: .* more than once through .*1\.input_layernorm\.spare;"):
        walk(model, halve, windows=windows(), statistic=ColumnNorm)
    assert hooks(model) == 0


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
def test_a_linear_no_token_is_routed_to_is_refused(kind, sequential):
    model = families.model("llama")
    block = blocks(model)[1][1]
    block.input_layernorm = Routed(block.input_layernorm)
    with pytest.raises(Refusal, match=r"^model\.layers\.1\.input_layernorm\.expert: no token of the"):
        walk(model, halve, windows=windows(), statistic=kind, sequential=sequential)
    assert hooks(model) == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("statistic", [None, ColumnNorm])
def test_broken_weights_are_refused_by_name_before_their_block_changes(broken, statistic):
    model = families.model("qwen3")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = broken
    with pytest.raises(Refusal, match=r"NaN or infinite values in model\.layers\.1\.mlp\.up_proj\.weight;"):
        walk(model, halve, windows=windows(), statistic=statistic)
    for name, parameter in model.named_parameters():
        if not name.startswith("model.layers.0.") and name != "model.layers.1.mlp.up_proj.weight":
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_broken_inputs_are_refused_by_name_and_leave_no_hook(sequential):
    model = families.model("llama")
    model.model.layers[1].post_attention_layernorm.variance_epsilon = float("nan")
    with pytest.raises(Refusal, match=r"model\.layers\.1\.mlp\.gate_proj: NaN or infinite inputs"):
        walk(model, halve, windows=windows(), statistic=ColumnNorm, sequential=sequential)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
def test_inputs_too_large_to_square_are_refused_by_name(kind):
    model = families.model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = 1e30
    read = {ColumnNorm: lambda s: s.norm(), Hessian: lambda s: s.inverse_factor(0.01)}[kind]
    with pytest.raises(Refusal, match=r"1\.mlp\.gate_proj: the squares of its inputs are more than fp32"):
        walk(model, lambda linear, taken: (read(taken), None)[1], windows=windows(), statistic=kind)


@pytest.mark.parametrize("made", [1e39, float("nan"), float("-inf")])
@pytest.mark.parametrize("statistic", [None, ColumnNorm])
def test_new_weights_the_dtype_does_not_hold_are_refused_by_name(made, statistic):
    model = families.model("llama")
    before = model.model.layers[0].self_attn.q_proj.weight.clone()

    def grow(linear: Linear, taken: Statistic | None) -> torch.Tensor:
        return torch.full(linear.weight.shape, made, dtype=torch.float64)

    said = r"^model\.layers\.0\.self_attn\.q_proj: the new weights leave the range of torch\.bfloat16;"
    with pytest.raises(Refusal, match=said):
        walk(model, grow, windows=windows() if statistic else None, statistic=statistic)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


@pytest.mark.parametrize(
    ("dtype", "size", "said"),
    [
        (torch.float16, 6e4, "the new weights leave the range of"),
        (torch.bfloat16, 3e38, "what its columns make up for grows past fp32"),
    ],
)
def test_what_sparsegpt_makes_of_weights_at_the_end_of_their_range_is_refused(dtype, size, said):
    model = families.model("llama").to(dtype)
    last = model.model.layers[-1].mlp.down_proj.weight.data
    last.copy_((torch.rand(last.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size)
    method = SparseGPT(
        source="base/m", method="sparsegpt", sparsity=0.5,
        calibration={"dataset": "news", "num_samples": 8, "sequence_length": 64},
    )  # fmt: skip

    def prune(linear: Linear, taken: Statistic | None) -> torch.Tensor:
        return method.weights(linear.weight, taken, linear.weight.numel() // 2)

    with pytest.raises(Refusal, match=rf"layers\.1\.mlp\.down_proj: {said}"):
        walk(model, prune, windows=windows(), statistic=Hessian)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_longer_than_the_model_reads_are_refused(family):
    with pytest.raises(Refusal, match=r"sequence_length 257 is more than the 256 tokens the model reads"):
        walk(families.model(family), halve, windows=windows(1, 257), statistic=ColumnNorm)


def test_a_refusal_of_the_method_names_the_linear():
    def refuse(linear: Linear, statistic: Statistic | None) -> torch.Tensor:
        raise Refusal("no such thing.")

    with pytest.raises(Refusal, match=r"^model\.layers\.0\.self_attn\.q_proj: no such thing\."):
        walk(families.model("llama"), refuse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_no_tensor_is_made_on_a_device_of_its_own_choosing(sequential, family):
    """With another default device, a tensor made without naming the weight's device could not mix with it."""
    model, tokens = families.model(family), windows()
    torch.set_default_device("meta")
    try:
        walk(model, halve, windows=tokens, statistic=Hessian, sequential=sequential)
    finally:
        torch.set_default_device(None)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_a_linear_that_is_handed_no_token_is_refused_by_name(sequential):
    """As an expert that no token is sent to."""
    model = families.model("llama")
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, :0]), torch.zeros_like(x)], 1)
    said = r"layers\.1\.mlp\.gate_proj: no token of the calibration text reached it; calibrate on more text"
    with pytest.raises(Refusal, match=said):
        walk(model, halve, windows=windows(), statistic=ColumnNorm, sequential=sequential)
    del mlp.forward
    assert hooks(model) == 0

"""The walk: each statistic has seen what its mode promises, and mistakes are refused by name."""

import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.compress import walk as walking
from stages.compress.statistics import ColumnNorm, Hessian, Statistic
from stages.compress.walk import default_batch_size, walk
from stages.core.errors import Refusal
from stages.job.transient import passing
from stages.model.blocks import Linear, blocks, device_of, linears
from stages.pruning.sparsegpt import SparseGPT
from tests import families

pytestmark = [pytest.mark.numerics, pytest.mark.device]
FAMILIES = list(families.CONFIGS)
MODES = [(mode, size) for mode in ("linear", "block", "none") for size in (None, 1, 2)]


def windows(count: int = 3, length: int = 24) -> torch.Tensor:
    return families.windows(count, length)


def coarse(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 32).round() / 32


def halve(linear: Linear, statistic: Statistic | None) -> torch.Tensor:
    """A compression that visibly changes every weight."""
    return coarse(linear.weight)


def hooks(model: torch.nn.Module) -> int:
    """Count the hooks and replaced forwards of a model."""
    replaced = sum("forward" in vars(module) for module in model.modules())
    return replaced + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def inputs_of(model: torch.nn.Module, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of the linears of these full names in one plain forward, `[tokens, in]` fp64."""
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


def promised(family: str, sequential: str, tokens: torch.Tensor) -> tuple[dict, torch.nn.Module]:
    """The inputs that a mode promises and the compressed model, from plain forwards, one a step: slow."""
    model, seen = families.model(family), {}
    for block, _ in blocks(model):
        groups = families.GROUPS[family]
        steps = groups if sequential == "linear" else [[name for group in groups for name in group]]
        for step in steps:
            names = [f"{block}.{name}" for name in step]
            watched = families.model(family) if sequential == "none" else model
            with torch.no_grad():
                seen |= inputs_of(watched, names, tokens)
            for linear in linears(model):
                if linear.name in names:
                    linear.weight.copy_(coarse(linear.weight))
    return seen, model


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
    walk(walked, note, windows=tokens, statistic=kind, sequential=sequential, batch_size=batch_size)
    assert len(taken) == len(linears(walked))
    assert hooks(walked) == 0

    seen, slow = promised(family, sequential, tokens)
    assert seen.keys() == taken.keys()
    # Forwards of fewer windows at a time may round differently in bf16, and later inputs with them.
    rtol = 1e-4 if batch_size is None else 0.05
    for name, inputs in seen.items():
        assert len(inputs) == tokens.numel()
        direct = inputs.square().mean(0).sqrt() if kind is ColumnNorm else 2 / len(inputs) * inputs.T @ inputs
        atol = 1e-6 if batch_size is None else 0.02 * float(direct.abs().max())
        torch.testing.assert_close(taken[name].double(), direct, rtol=rtol, atol=atol)
    for name, parameter in walked.named_parameters():
        assert torch.equal(parameter, slow.get_parameter(name)), name


@pytest.mark.parametrize("family", [*FAMILIES, *families.RARE])
@pytest.mark.parametrize(
    ("sequential", "batch_size"), [("none", 2), ("none", 1), ("block", 2), ("linear", None), ("linear", 2)]
)
def test_statistics_are_those_of_plain_forwards(sequential, batch_size, family):
    """Whatever blocks share: each window's inputs come from a plain forward of that window alone."""
    model, tokens, taken = families.wide(family), windows(5), {}
    names = [linear.name for linear in linears(model)]
    plain = [inputs_of(model, names, window[None]) for window in tokens]

    def note(linear: Linear, statistic: Statistic) -> None:
        taken[linear.name] = statistic.norm()

    walk(model, note, windows=tokens, statistic=ColumnNorm, sequential=sequential, batch_size=batch_size)
    for name in names:
        direct = torch.cat([inputs[name] for inputs in plain]).square().mean(0).sqrt()
        torch.testing.assert_close(taken[name].double(), direct, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_block_takes_no_more_than_batch_size_windows(size, sequential):
    model, rows = families.model("llama"), []
    for linear in linears(model):
        linear.module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    walk(model, halve, windows=windows(), statistic=Hessian, sequential=sequential, batch_size=size)
    assert max(rows) == size


class Waits(TorchDispatchMode):
    """Count the reads of a tensor's values, at each of which a card's queue runs empty."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_nothing_waits_for_a_batch(sequential, kind):
    def waits(batch_size: int) -> int:
        model, tokens = families.model("llama"), windows(6)
        with Waits() as seen:
            walk(model, halve, windows=tokens, statistic=kind, sequential=sequential, batch_size=batch_size)
        return seen.count

    assert waits(1) == waits(6) > 0


def test_a_card_takes_a_fixed_number_of_tokens_at_a_time(monkeypatch):
    model, tokens = families.model("llama"), windows(5, 4)
    monkeypatch.setattr(walking, "CARD_TOKENS", 9)
    monkeypatch.setattr(walking, "TOKENS", 12)
    device = device_of(model)
    if device.type == "cpu":
        assert default_batch_size(model, tokens, "linear") == 5
        assert default_batch_size(model, tokens, "block") == 3
    monkeypatch.setattr(walking, "device_of", lambda model: torch.device("cuda"))
    for sequential in ("linear", "block", "none"):
        assert default_batch_size(model, tokens, sequential) == 2
        assert default_batch_size(model, windows(5, 10), sequential) == 1


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_too_little_memory_is_refused_with_the_settings_to_lower(sequential):
    model = families.model("llama")

    def exhaust(linear: Linear, statistic: Statistic) -> None:
        if linear.name.endswith("1.mlp.down_proj"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")

    with pytest.raises(Refusal, match=r"lower .* batch_size \(now 2\), num_samples") as refused:
        walk(model, exhaust, windows=windows(), statistic=Hessian, sequential=sequential, batch_size=2)
    assert passing(refused.value) == "card"
    assert hooks(model) == 0


def test_linears_in_another_order_for_some_windows_are_refused():
    model, calls = families.model("llama"), []
    attention = model.model.layers[1].self_attn
    whole = attention.forward

    def forward(hidden_states: torch.Tensor, **kwargs):
        calls.append(len(hidden_states))
        if len(calls) == 4:  # the first call shows the groups
            attention.o_proj(hidden_states)
        return whole(hidden_states=hidden_states, **kwargs)

    attention.forward = forward
    with pytest.raises(Refusal, match=r"layers\.1 runs its linears in another order for some windows; set"):
        walk(model, halve, windows=windows(), statistic=ColumnNorm, sequential="linear", batch_size=1)
    del attention.forward
    assert hooks(model) == 0


def test_a_refusal_in_the_middle_of_a_block_leaves_no_hook():
    model = families.model("llama")

    def refuse(linear: Linear, statistic: Statistic) -> None:
        if linear.name.endswith("o_proj"):
            raise Refusal("enough.")

    with pytest.raises(Refusal, match=r"o_proj: enough\."):
        walk(model, refuse, windows=windows(), statistic=ColumnNorm, sequential="linear")
    assert hooks(model) == 0
    assert torch.is_grad_enabled()
    with torch.no_grad():
        model(input_ids=windows())


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_a_group_shares_one_statistic_and_none_is_kept(sequential):
    seen: dict[str, weakref.ref[Statistic]] = {}
    alive = []

    def note(linear: Linear, statistic: Statistic) -> None:
        seen[linear.name] = weakref.ref(statistic)
        alive.append(len({id(reference()) for reference in seen.values() if reference()}))
        for group in families.GROUPS["llama"]:
            mates = [f"{linear.block}.{name}" for name in group]
            if linear.name in mates:
                assert all(seen[mate]() is statistic for mate in mates if mate in seen)

    walk(families.model("llama"), note, windows=windows(), statistic=Hessian, sequential=sequential)
    assert len(seen) == 14
    assert all(reference() is None for reference in seen.values())
    assert max(alive) == 1


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_ignored_linears_keep_their_weights(sequential):
    model, before = families.model("llama"), families.model("llama")
    ignore = ("self_attn.v_proj", "mlp.down_proj")
    walk(model, halve, windows=windows(), statistic=Hessian, ignore=ignore, sequential=sequential)
    for linear, old in zip(linears(model), linears(before), strict=True):
        assert torch.equal(linear.weight, old.weight) == linear.name.endswith(ignore)


def test_the_experts_of_a_mixture_can_be_ignored():
    model, before = families.mixture(), families.mixture()
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
    walk(model, halve, windows=windows(), statistic=Hessian, ignore=ignore)
    for name, parameter in before.named_parameters():
        changed = ".self_attn." in name and parameter.ndim == 2
        assert torch.equal(parameter, model.get_parameter(name)) != changed, name


def test_a_linear_the_forward_never_reaches_is_refused():
    model = families.model("llama")
    blocks(model)[0][1].spare = torch.nn.Linear(4, 4, device=families.DEVICE)
    with pytest.raises(Refusal, match=r"never reaches model\.layers\.0\.spare"):
        walk(model, halve, windows=windows(), statistic=ColumnNorm)
    assert hooks(model) == 0


class Twice(torch.nn.Module):
    """A norm beside a linear that is passed through twice."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.spare = torch.nn.Linear(32, 32, dtype=torch.bfloat16, device=families.DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.spare(self.spare(x))


class Routed(torch.nn.Module):
    """A norm beside a linear to which no token is routed."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.expert = torch.nn.Linear(32, 32, dtype=torch.bfloat16, device=families.DEVICE)

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
def test_a_linear_that_no_token_is_routed_to_is_refused(kind, sequential):
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
    with pytest.raises(
        Refusal,
        match=r"model\.layers\.1\.mlp\.gate_proj: its inputs are NaN or infinite, .*\. Set run\.dtype",
    ):
        walk(model, halve, windows=windows(), statistic=ColumnNorm, sequential=sequential)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
def test_inputs_too_large_to_square_are_refused_by_name(kind):
    model = families.model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = 1e30
    with pytest.raises(Refusal, match=r"1\.mlp\.gate_proj: .* or their squares overflow fp32; nothing was"):
        walk(model, halve, windows=windows(), statistic=kind)


@pytest.mark.parametrize("value", [1e39, float("nan"), float("-inf")])
@pytest.mark.parametrize("statistic", [None, ColumnNorm])
def test_new_weights_outside_the_range_of_the_dtype_are_refused_by_name(value, statistic):
    model = families.model("llama")
    before = model.model.layers[0].self_attn.q_proj.weight.clone()

    def grow(linear: Linear, taken: Statistic | None) -> torch.Tensor:
        return torch.full(linear.weight.shape, value, dtype=torch.float64)

    message = r"^model\.layers\.0\.self_attn\.q_proj: its new weights leave the range of torch\.bfloat16;"
    with pytest.raises(Refusal, match=message):
        walk(model, grow, windows=windows() if statistic else None, statistic=statistic)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        (torch.float16, 6e4, "its new weights leave the range of"),
        (torch.bfloat16, 3e38, "the error its columns compensate for overflows fp32"),
    ],
)
def test_sparsegpt_refuses_weights_at_the_end_of_their_range(dtype, size, message):
    model = families.model("llama").to(dtype)
    last = model.model.layers[-1].mlp.down_proj.weight.data
    last.copy_((torch.rand(last.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size)
    method = SparseGPT(
        source="base/m", method="sparsegpt", sparsity=0.5,
        calibration={"dataset": "news", "num_samples": 8, "sequence_length": 64},
    )  # fmt: skip

    def prune(linear: Linear, taken: Statistic | None) -> torch.Tensor:
        return method.weights(linear.weight, taken, linear.weight.numel() // 2)

    with pytest.raises(Refusal, match=rf"layers\.1\.mlp\.down_proj: {message}"):
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
def test_every_tensor_is_on_the_device_of_the_weights(sequential, family):
    """On another default device, a tensor created without the weights' device could not mix with them."""
    model, tokens = families.model(family), windows()
    with torch.device("meta"):
        walk(model, halve, windows=tokens, statistic=Hessian, sequential=sequential)
    assert {p.device.type for p in model.parameters()} == {torch.device(families.DEVICE).type}


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_a_block_whose_mlp_gets_no_token_is_refused(sequential):
    model = families.model("llama")
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    message = r"layers\.1\.mlp\.gate_proj: no token of the calibration text reached it; calibrate"

    def empty(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(x[:, :0]), torch.zeros_like(x)], 1)

    with mock.patch.object(mlp, "forward", empty), pytest.raises(Refusal, match=message):
        walk(model, halve, windows=windows(), statistic=ColumnNorm, sequential=sequential)
    assert hooks(model) == 0


@pytest.mark.parametrize("order", [(0,), (0, 0, 1)])
def test_blocks_that_text_reaches_never_or_twice_are_refused(order):
    model = families.model("llama")
    layers = list(model.model.layers)

    class Path(torch.nn.ModuleList):
        """The model's blocks, run in another order."""

        def __getitem__(self, index):
            taken = super().__getitem__(index)
            return [layers[number] for number in order] if isinstance(index, slice) else taken

    model.model.layers = Path(layers)
    message = r"layers\.0; use" if order.count(0) > 1 else r"never reaches model\.layers\.1 of Llama"
    with pytest.raises(Refusal, match=message):
        walk(model, lambda *_: None, windows=windows(), statistic=ColumnNorm)
    assert hooks(model) == 0


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_linears_that_share_a_statistic_come_together(sequential):
    model, seen = families.model("llama"), []

    def halve_all(linears: list[Linear], statistic: Statistic | None) -> Iterator[torch.Tensor]:
        seen.append([linear.name.removeprefix(f"{linear.block}.") for linear in linears])
        return (halve(linear, statistic) for linear in linears)

    walk(model, halve_all, by_group=True, windows=windows(), statistic=ColumnNorm, sequential=sequential)
    assert seen == families.GROUPS["llama"] * 2
    for linear in linears(model):
        assert torch.equal(linear.weight, coarse(linear.weight))


def test_a_refusal_names_the_linear_of_a_group_it_is_about():
    def refuse_second(linears: list[Linear], statistic: Statistic | None) -> Iterator[torch.Tensor]:
        yield linears[0].weight
        raise Refusal("no such thing.")

    with pytest.raises(Refusal, match=r"^model\.layers\.0\.self_attn\.k_proj: no such thing\."):
        walk(families.model("llama"), refuse_second, by_group=True, windows=windows(), statistic=ColumnNorm)

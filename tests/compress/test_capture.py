"""What flows into a block: the arguments of its call, their batches, and the linears that share an input."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from stages.compress.capture import call_of, input_groups, join_outputs, split_call
from stages.model.blocks import blocks, forward, linears
from tests import families

pytestmark = pytest.mark.numerics
BIASED = {
    "bloom": BloomConfig(vocab_size=families.VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(vocab_size=families.VOCAB, d_model=32, n_layers=2, n_heads=4),
}
"""Families that hand their blocks positions by head: a row per window and head, or a row per head."""


def windows(count: int, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def model_of(family: str) -> torch.nn.Module:
    """A model in fp32, where the number of windows computed at once changes no more than the last digits."""
    if family not in BIASED:
        return families.model(family).float()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BIASED[family]).eval()


def hidden(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", [*families.CONFIGS, *BIASED])
def test_a_blocks_call_is_the_one_its_model_makes(family):
    model = model_of(family)
    for _, block in blocks(model):
        calls = []
        handle = block.register_forward_pre_hook(
            lambda module, *call, calls=calls: calls.append(call), with_kwargs=True
        )
        forward(model, windows(2))
        handle.remove()
        args, kwargs = call_of(block, lambda: forward(model, windows(2)))
        assert "forward" not in vars(block)
        (plain,) = calls
        assert kwargs.keys() == plain[1].keys() and len(args) == len(plain[0])
        assert torch.equal(args[0], plain[0][0])
        with torch.no_grad():
            again = hidden(block(*args, **kwargs))
            assert torch.equal(again, hidden(block(*plain[0], **plain[1])))


def test_nothing_after_the_block_is_computed():
    model, after = families.model("llama"), []
    blocks(model)[1][1].register_forward_pre_hook(lambda module, args: after.append(args))
    call_of(blocks(model)[0][1], lambda: forward(model, windows(1)))
    assert not after


def test_a_block_that_is_never_called_is_a_bug():
    model = families.model("llama")
    with pytest.raises(AssertionError, match="never calls"):
        call_of(blocks(model)[0][1], lambda: None)
    assert "forward" not in vars(blocks(model)[0][1])


@pytest.mark.parametrize("family", [*families.CONFIGS, *BIASED])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_block_computes_the_same_in_batches(size, family):
    """There are as many windows as heads, which no shape tells apart."""
    model = model_of(family)
    single = call_of(blocks(model)[0][1], lambda: forward(model, windows(1)))
    for _, block in blocks(model):
        args, kwargs = call = call_of(block, lambda block=block: forward(model, windows(4)))
        calls = split_call(call, 4, size, single)
        assert len(calls) == -(-4 // size)
        with torch.no_grad():
            outputs = [block(*args, **kwargs) for args, kwargs in calls]
            assert len(hidden(outputs[0])) == size
            joined, whole = hidden(join_outputs(outputs)), hidden(block(*args, **kwargs))
        assert joined.shape == whole.shape == (4, 24, 32)
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)


def test_what_has_no_row_for_every_window_is_shared():
    mask, flag = torch.ones(1, 1, 24, 24), object()
    stream, by_head = torch.arange(4.0).view(4, 1), torch.arange(16.0)
    call = (stream,), {"mask": mask, "pair": (by_head, None), "names": ["a"], "flag": flag}
    single = (stream[:1],), {"mask": mask, "pair": (by_head[:4], None), "names": ["a"], "flag": flag}
    calls = split_call(call, 4, 3, single)
    assert [args[0].flatten().tolist() for args, _ in calls] == [[0, 1, 2], [3]]
    assert [len(kwargs["pair"][0]) for _, kwargs in calls] == [12, 4]
    for _, kwargs in calls:
        assert kwargs["mask"] is mask and kwargs["flag"] is flag
        assert kwargs["names"] == ["a"] and kwargs["pair"][1] is None


def test_every_family_has_its_groups():
    assert families.GROUPS.keys() == families.CONFIGS.keys()


@pytest.mark.parametrize("family", families.CONFIGS)
def test_linears_are_grouped_by_the_tensor_they_read(family):
    model = families.model(family)
    for name, block in blocks(model):
        args, kwargs = call_of(block, lambda block=block: forward(model, windows(2)))
        inside = [linear for linear in linears(model) if linear.block == name]
        with torch.no_grad():
            groups = input_groups(block, inside, lambda: block(*args, **kwargs))  # noqa: B023
        names = [[linear.name.removeprefix(f"{name}.") for linear in group.linears] for group in groups]
        assert names == families.GROUPS[family]
        for number, group in enumerate(groups):
            assert group.inputs.numel() == 2 * 24 * group.linears[0].weight.shape[1]
            feeder = next((n for n, module in block.named_modules() if module is group.feeder), "")
            assert ("norm" in feeder or "ln_" in feeder) == (number in (0, 2)), feeder
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())

"""What flows into a block: the arguments of its call, and the linears that share an input."""

import pytest
import torch

from stages.compress.capture import call_of, input_groups
from stages.model.blocks import blocks, forward, linears
from tests import families

pytestmark = [pytest.mark.numerics, pytest.mark.device]
EVERY = [*families.CONFIGS, *families.RARE]


def windows(count: int, length: int = 24) -> torch.Tensor:
    return families.windows(count, length)


def hidden(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", EVERY)
def test_a_blocks_call_is_the_one_its_model_makes(family):
    model = families.wide(family)
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

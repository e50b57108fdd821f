"""AdamW on fp32 masters: small steps are not lost, and a restored state continues bit for bit."""

import pytest
import torch

from stages.recovery.adam import Adam

pytestmark = [pytest.mark.numerics, pytest.mark.device]
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
)


def weights(device: str = "cpu") -> dict[str, torch.nn.Parameter]:
    shapes = {"matrix": (3, 2), "bias": (3,)}
    return {
        name: torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16, device=device))
        for name, shape in shapes.items()
    }


def step(adam: Adam, weights: dict[str, torch.nn.Parameter], rate: float) -> None:
    for weight in weights.values():
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
    adam.step(rate)


def test_a_small_step_is_not_lost_in_a_narrow_weight():
    narrow = weights()
    adam = Adam(narrow, weight_decay=0.0)
    for _ in range(10):
        step(adam, narrow, 1e-3)  # less than half of bf16's step at 1, 2^-9
    for name, weight in narrow.items():
        assert (weight.float() - 0.99).abs().max() < 2**-8
        assert adam.state()[f"{name}.master"].sub(0.99).abs().max() < 1e-5


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("count", [0, 3])
def test_a_restored_state_is_where_a_fresh_one_is_and_continues_bit_for_bit(count, device):
    """A checkpoint is read to the CPU; the optimizer needs each tensor where it creates it."""
    first, second = weights(device), weights(device)
    fresh, restored = Adam(first, weight_decay=0.1), Adam(second, weight_decay=0.1)
    for _ in range(count):
        step(fresh, first, 1e-2)
    restored.load({name: tensor.detach().cpu().clone() for name, tensor in fresh.state().items()})
    for _ in range(2):
        expected, state = fresh.state(), restored.state()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (state[name].device, state[name].dtype) == (tensor.device, tensor.dtype), name
            assert torch.equal(state[name], tensor), name
        assert all(torch.equal(weight, second[name]) for name, weight in first.items())
        step(fresh, first, 1e-2)
        step(restored, second, 1e-2)

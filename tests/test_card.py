"""Every method computes on its device alone: on a card that is not there, and with the CPU's bytes."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import card
from tests.card import Misplaced, pretended
from tests.pipeline import do, params
from tests.test_contract import CASES, SERVED, recipes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
QUICK = {"sparsegpt", "awq", "lora"}
"""Methods tried on the first family in every run of the tests; the drills try all on all."""


def on_card(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(card.NAME)


def test_tensors_of_two_devices_do_not_meet():
    with pretended():
        ours, theirs = on_card(3), torch.ones(3)
        assert torch.equal((ours * 2 + torch.tensor(1.0)).cpu(), torch.full((3,), 3.0))
        assert ours[torch.tensor([0, 2])].shape == (2,)
        for mixed in (
            lambda: ours + theirs,
            lambda: ours.add_(theirs),
            lambda: theirs[on_card(3) > 0],
            lambda: torch.stack([ours.sum(), theirs.sum()]),
            lambda: torch.equal(ours, theirs),
            lambda: theirs * ours.sum(),
        ):
            with pytest.raises(Misplaced, match="two devices"):
                mixed()


def test_a_module_left_behind_and_the_state_of_an_optimizer_are_noticed():
    with pretended():
        norm = torch.nn.BatchNorm1d(2).eval().to(card.NAME)
        norm(on_card(1, 2))
        norm._buffers["running_mean"] = torch.zeros(2)
        with pytest.raises(Misplaced, match="two devices"):
            norm(on_card(1, 2))

        weight = torch.nn.Parameter(on_card(2, 2))
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.grad = on_card(2, 2)
        optimizer.step()
        optimizer.state[weight]["step"] = optimizer.state[weight]["step"].cpu()
        with pytest.raises(Misplaced, match="_fused_adamw_"):
            optimizer.step()


def test_a_kernel_that_is_not_deterministic_and_a_generator_of_the_cpu_are_noticed():
    with pretended() as counts:
        for refused in (lambda: on_card(4).histc(), lambda: on_card(4).median(0)):
            with pytest.raises(Misplaced, match="deterministic"):
                refused()
        with pytest.raises(Misplaced, match="generator of the CPU"):
            on_card(4).normal_(generator=torch.Generator())
        assert counts["draws"] == 0
        on_card(4).normal_()
        torch.rand(4, device=card.NAME)
        assert counts["draws"] == 2


def test_waits_are_counted():
    with pretended() as counts:
        total = on_card(4)[::2].sum()
        assert counts["waits"] == 0
        assert float(total) == 2 and total.cpu() == 2 and on_card(2).tolist() == [1, 1]
        assert counts["waits"] == 3


def written(section: str) -> bytes:
    return Path("data/models", section, "result", "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("section", "case", "family"),
    [
        pytest.param(*each, marks=[] if each[1] in QUICK and each[2] == "llama" else pytest.mark.drill)
        for each in [*SERVED, *((section, case, "gemma3_wrapper") for section, case in CASES)]
    ],
)
def test_a_method_stays_on_its_device_and_writes_what_a_cpu_writes(section, case, family, workspace):
    chosen = params(family, recipes(section, case))
    with sdpa_kernel(SDPBackend.MATH):  # as on the card
        do(chosen)
    expected = written(section)
    shutil.rmtree(Path("data/models", section, "result"))
    with pretended():
        do(chosen, [f"{section}/result"])
    assert written(section) == expected

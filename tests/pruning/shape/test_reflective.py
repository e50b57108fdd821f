"""RESP on structures: sums over coupled weights, steps that grow, a plain model that is smaller."""

import re

import pytest
import torch
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.gradients import loss_gradients
from stages.pruning.shape.reflective import ReflectiveStructures
from tests.pipeline import NONE, TEXT, do, load, params, record

pytestmark = [pytest.mark.numerics, pytest.mark.device]
OWN = TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8}
RECIPE = {
    "source": "base/tiny", "method": "resp-structures", "sparsity": 0.5, "steps": 2, "calibration": OWN,
}  # fmt: skip


def sums(gradients: dict[str, torch.Tensor], model: torch.nn.Module, block: int) -> dict[str, torch.Tensor]:
    """Sum |w * gradient| structure by structure, in plain loops over the names of a Llama."""
    moved = {
        linear.name.removeprefix(f"model.layers.{block}."): (
            linear.weight.float() * gradients[linear.name]
        ).abs()
        for linear in linears(model)
        if linear.block == f"model.layers.{block}"
    }
    neurons = [
        float(
            moved["mlp.gate_proj"][n].sum()
            + moved["mlp.up_proj"][n].sum()
            + moved["mlp.down_proj"][:, n].sum()
        )
        for n in range(64)
    ]
    groups = []
    for group in range(2):  # of two query heads of eight features
        queries, keys = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
        groups.append(
            float(
                moved["self_attn.q_proj"][queries].sum()
                + moved["self_attn.k_proj"][keys].sum()
                + moved["self_attn.v_proj"][keys].sum()
                + moved["self_attn.o_proj"][:, queries].sum()
            )
        )
    return {"neurons": torch.tensor(neurons), "heads": torch.tensor(groups)}


def test_structures_of_the_least_sums_go_step_by_step(workspace, monkeypatch):
    seen = []

    def watched(model, targets, windows, **options):
        assert options["prompt_length"] == 8
        gradients, loss = loss_gradients(model, targets, windows, **options)
        seen.append((windows, [sums(gradients, model, block) for block in range(2)]))
        return gradients, loss

    monkeypatch.setattr("stages.pruning.shape.reflective.loss_gradients", watched)
    do(params("llama", {"prune/made": RECIPE}))
    base, made, facts = load("base/tiny"), load("prune/made"), record("prune/made")
    notes = facts["notes"]["prune/made"]
    assert [(step["neurons"], step["heads"]) for step in notes["steps"]] == [(48, 2), (32, 1)]
    assert made.config.intermediate_size == 32 and made.config.num_key_value_heads == 1
    assert facts["num_parameters"] == sum(p.numel() for p in made.parameters()) < 40_000
    (first, before), (second, after) = seen
    assert torch.equal(first[:, :8], second[:, :8]) and not torch.equal(first, second)
    for block in range(2):
        gone = set(before[block]["neurons"].argsort(stable=True)[:16].tolist())
        rest = [n for n in after[block]["neurons"].argsort(stable=True).tolist() if n not in gone]
        kept = sorted(rest[16:])
        names = f"model.layers.{block}.mlp.gate_proj.weight", f"model.layers.{block}.mlp.down_proj.weight"
        assert torch.equal(made.get_parameter(names[0]), base.get_parameter(names[0])[kept])
        assert torch.equal(made.get_parameter(names[1]), base.get_parameter(names[1])[:, kept])
        (group,) = after[block]["heads"].argsort()[1:].tolist()
        assert notes["heads"]["kept"][f"model.layers.{block}"] == [2 * group, 2 * group + 1]


def test_zeros_of_a_source_stay_and_two_runs_are_the_same_bytes(workspace):
    first = {
        "source": "base/tiny", "method": "magnitude", "sparsity": 0.3, "scope": "matrix", "calibration": NONE,
    }  # fmt: skip
    again = RECIPE | {"source": "prune/first", "kinds": ("neurons",)}
    do(params("gpt2", {"prune/first": first, "prune/one": again, "prune/two": again}))
    one, two = (
        (workspace / "data" / "models" / "prune" / name / "model.safetensors").read_bytes()
        for name in ("one", "two")
    )
    assert one == two
    assert record("prune/one")["sparsity"] > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": TEXT}, "tokens is text, but resp-structures is calibrated on text the model writes"),
        ({"ignore": ("mlp.gate",)}, "ignore must be left out"),
        ({"kinds": ("heads", "heads")}, "kinds lists heads twice"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        ReflectiveStructures(**RECIPE | settings)


def test_less_than_one_group_of_heads_is_refused(workspace):
    chosen = params("llama", {"prune/made": RECIPE | {"sparsity": 0.4}})
    with pytest.raises(
        Refusal, match=r"remove 0\.4 of 2 groups of heads is less than one; the smallest is 0\.5"
    ):
        do(chosen)

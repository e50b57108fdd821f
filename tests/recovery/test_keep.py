"""Frozen weights: which weights are frozen, and that training and the file keep them bit for bit."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from stages.model.blocks import linears
from stages.model.checkpoint import zero_masks
from stages.recovery.keep import Small
from tests import families
from tests.pipeline import NONE, dense, do, load, params, record
from tests.tuned import LORA, TEXT, recipe, run, tune

pytestmark = pytest.mark.device

MAGNITUDE = {
    "source": "base/tiny", "method": "magnitude", "sparsity": 0.5, "scope": "matrix", "calibration": NONE
}  # fmt: skip
TRAINED = {"train": TEXT, "learning_rate": 0.01, "steps": 3, "batch_size": 2, "weight_decay": 0.1}
HALF = {"small": {"sparsity": 0.5}}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {linear.name: linear.module.weight.detach().clone() for linear in linears(model)}


@pytest.mark.parametrize("scope", ["matrix", "row", "global"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("before", [0.0, 0.2, 0.4])
def test_small_weights_are_those_that_magnitude_pruning_removes(before, family, scope, workspace):
    """Also of a source that already has zeros, spread unevenly."""
    source = MAGNITUDE | {"scope": "global", "sparsity": before}
    recipe = MAGNITUDE | {"scope": scope, "sparsity": 0.3, "source": "prune/before"}
    do(params(family, {"prune/before": source, "prune/small": recipe}))
    base = load("prune/before")
    small = Small(sparsity=0.3, scope=scope).masks(linears(base))
    pruned = {linear.name: linear.weight == 0 for linear in linears(load("prune/small"))}
    assert any(mask.any() for mask in pruned.values())
    for name, mask in pruned.items():
        assert torch.equal(small[name], mask), name
    again = Small(sparsity=0.3, scope=scope).masks(linears(base.bfloat16()))  # as in `run.dtype`
    assert sum(mask.sum() for mask in again.values()) == sum(mask.sum() for mask in small.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "small"}, "keep small needs small, such as small: {sparsity: 0.5, scope: matrix}"),
        (HALF, "small has no effect with keep mask; leave it out, or set keep: small or shuffled"),
        ({"keep": "none", **HALF}, "small has no effect with keep none"),
    ],
)
def test_small_is_set_where_it_is_needed_and_nowhere_else(settings, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        recipe("full", **settings)


@pytest.mark.parametrize("keep", ["mask", "none", "small", "shuffled"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", families.CONFIGS)
def test_frozen_weights_keep_their_values_and_the_others_train(family, method, keep):
    model = families.model(family)
    generator = torch.Generator().manual_seed(1)
    for linear in linears(model):
        linear.weight[
            torch.rand(linear.weight.shape, generator=generator).to(linear.weight.device) < 0.25
        ] = 0
    settings = {"weight_decay": 0.1, "keep": keep} | (HALF if keep in ("small", "shuffled") else {})
    chosen = recipe(method, **settings)
    # The weights that training begins with: the arm shuffles first, by a draw of the seed alone.
    start = families.model(family)
    start.load_state_dict(model.state_dict())
    frozen = chosen.frozen(linears(start))
    before = weights(start)
    recovered, points = tune(chosen, model)
    assert points[-1].heldout_loss < points[0].heldout_loss
    for name, after in weights(recovered.model).items():
        mask = frozen.get(name, torch.zeros_like(after, dtype=torch.bool))
        assert mask.any() == (keep != "none")
        assert torch.equal(after[mask], before[name][mask]), name
        assert (after[~mask] != before[name][~mask]).float().mean() > 0.5, name
    assert set(recovered.zeros) == (set(before) if keep == "mask" else set())


def test_shuffling_permutes_the_small_weights_of_each_matrix_alone():
    base, model = families.model("gpt2"), families.model("gpt2")
    small = recipe("full", keep="small", **HALF).frozen(linears(base))
    shuffled = recipe("full", keep="shuffled", **HALF).frozen(linears(model))
    after = weights(model)
    for name, before in weights(base).items():
        mask = small[name]
        assert torch.equal(shuffled[name], mask)
        assert torch.equal(after[name][~mask], before[~mask])
        assert torch.equal(after[name][mask].sort().values, before[mask].sort().values)
        assert (after[name][mask] != before[mask]).float().mean() > 0.9
    again, other = families.model("gpt2"), families.model("gpt2")
    recipe("full", keep="shuffled", **HALF).frozen(linears(again))
    recipe("full", keep="shuffled", seed=1, **HALF).frozen(linears(other))
    assert all(torch.equal(weights(again)[name], weight) for name, weight in after.items())
    assert not any(torch.equal(weights(other)[name], weight) for name, weight in after.items())


def test_zeros_are_zero_after_every_step_and_frozen_gradients_do_not_count_in_the_norm(monkeypatch):
    model = families.model("llama")
    for linear in linears(model):
        linear.weight[linear.weight.abs() < 0.01] = 0
    zeros = zero_masks(linears(model))
    chosen = recipe("full", weight_decay=0.1)
    arm = chosen.arm(model, None)
    kept, gradients, step = [], [], arm.step

    def watched(learning_rate):
        for name, mask in zeros.items():
            gradients.append(model.get_parameter(f"{name}.weight").grad[mask].abs().max())
        step(learning_rate)
        kept.append(all((weights(model)[name][mask] == 0).all() for name, mask in zeros.items()))

    monkeypatch.setattr(arm, "step", watched)
    run(chosen, arm)
    assert kept == [True] * 8
    assert max(gradients) == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ignored_matrices_do_not_train(method):
    model = families.model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recovered, _ = tune(recipe(method, ignore=("mlp.down_proj",)), model)
    same = {
        name: torch.equal(recovered.model.get_parameter(name), value)
        for name, value in before.items()
        if "_proj" in name
    }
    assert same == {name: "down_proj" in name for name in same}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_zero_of_the_source_is_zero_in_the_file(family, workspace):
    recipes = {"prune/half": MAGNITUDE}
    for method, options in {"lora": LORA, "full": {}}.items():
        for keep in ("mask", "none"):
            recipes[f"finetune/{method}-{keep}"] = {
                "source": "prune/half", "method": method, "keep": keep, **TRAINED, **options
            }  # fmt: skip
    do(params(family, recipes))
    masks = zero_masks(linears(load("prune/half")))
    for artifact in list(recipes)[1:]:
        zeros = {linear.name: linear.module.weight == 0 for linear in linears(load(artifact))}
        kept = all(bool(zeros[name][mask].all()) for name, mask in masks.items())
        assert kept == artifact.endswith("mask")
        assert record(artifact)["sparsity"] == pytest.approx(0.5 if kept else 0, abs=0.02)


def test_a_quantized_source_ends_on_its_grid_or_dense_as_the_recipe_says(workspace):
    recipes = {
        "prune/half": MAGNITUDE,
        "quantize/four": {
            "source": "prune/half", "method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE
        },
    } | {
        f"finetune/{method}-{'grid' if grid else 'dense'}": {
            "source": "quantize/four", "method": method, "requantize": grid, **TRAINED, **options
        }
        for method, options in {"lora": LORA, "full": {}}.items()
        for grid in (True, False)
    }  # fmt: skip
    do(params("llama", recipes))
    masks = zero_masks(linears(load("prune/half")))
    for artifact in list(recipes)[2:]:
        assert record(artifact)["layout"] == ("pack-quantized" if artifact.endswith("grid") else "dense")
        model = dense(load(artifact))
        for name, mask in masks.items():
            assert (model.get_submodule(name).weight[mask] == 0).all()
    sizes = [
        (Path("data/models") / artifact / "model.safetensors").stat().st_size
        for artifact in list(recipes)[1:3]
    ]
    assert sizes[0] == sizes[1]

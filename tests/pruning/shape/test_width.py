"""Width pruning: the dense model without those neurons, as a smaller plain checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.shape import anatomy
from stages.pruning.shape.shrink import shrink
from stages.pruning.shape.shrinker import measure_inputs
from stages.pruning.shape.width import BY_WEIGHT
from tests import families
from tests.pipeline import NONE, TEXT, do, load, params, prune, record
from tests.shapes import WINDOWS, full, logits, plan, reloaded, width

pytestmark = [pytest.mark.numerics, pytest.mark.device]
KEYS = {"opt": "ffn_dim", "gpt2": "n_inner"}
"""The config's key for the width, where it is not intermediate_size."""


@pytest.mark.parametrize("family", [*families.CONFIGS, "gemma4_unified"])
@pytest.mark.parametrize("importance", ["ppm", "llm-bip"])
def test_the_result_is_the_dense_model_with_those_neurons_silent(family, importance, tmp_path):
    dense = full(family)
    options = {} if importance == "ppm" else {"calibration": TEXT}
    recipe = width(importance=importance, remove=0.3, **options)
    parts = anatomy.mlps(dense)
    rms = measure_inputs(dense, parts, WINDOWS, 2, "width") if options else {}
    cuts, changes, notes = recipe.plan(dense, parts, rms)
    before = next(iter(parts.values())).width
    count = -(-before * 7 // 10)
    assert changes == {KEYS.get(family, "intermediate_size"): count}
    assert notes == {"width": {"before": before, "after": count}, "expansion": count / 32}

    small = full(family)
    shrink(small, cuts, changes)
    for part in parts.values():
        dim, kept = cuts[f"{part.writer.name}.weight"]
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == count
        gone = [i for i in range(before) if i not in set(kept.tolist())]
        assert dim == (0 if part.writer.transposed else 1)
        part.writer.weight[:, gone] = 0
    again = reloaded(small, tmp_path)
    assert torch.allclose(logits(again), logits(dense), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(again), logits(full(family)), atol=1e-2)
    tokens = again.generate(WINDOWS[:1, :4], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 10)


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("target", ["remove", "expansion"])
def test_removing_nothing_changes_nothing(family, target, workspace):
    options = {"remove": 0.0} if target == "remove" else {"expansion": 4.0 if family == "gpt2" else 2.0}
    recipe = {"source": "base/tiny", "method": "width", "importance": "vow", "calibration": NONE}
    do(params(family, {"prune/made": recipe | options}))
    base, pruned = load("base/tiny"), load("prune/made")
    assert pruned.config.to_diff_dict() == base.config.to_diff_dict()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, pruned.get_parameter(name)), name


def test_the_published_formulas_by_hand():
    gate = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.25, 0.5]])
    up = torch.tensor([[-1.0, -2.0, 0.0], [4.0, -4.0, 0.0]])
    # max + |min| of a row, literally: 2 + 3 and 0 + 2; 0.5 + 0.25 and 4 + 4
    assert BY_WEIGHT["ppm"]([gate, up]).tolist() == [7.0, 8.75]
    # the rows' means are 0, 5/12, -1, 0; squares are summed over n - 1
    expected = [7 + 1, (2 * (1 / 12) ** 2 + (1 / 6) ** 2) / 2 + 16]
    assert BY_WEIGHT["vow"]([gate, up]).tolist() == pytest.approx(expected)
    assert BY_WEIGHT["pon"]([gate, up]).tolist() == [6 * 3, 1.25 * 8]
    assert BY_WEIGHT["l2"]([gate, up]).tolist() == pytest.approx([19**0.5, (0.5625 + 32) ** 0.5])
    # a plain MLP: the first linear in place of gate and up
    assert BY_WEIGHT["ppm"]([gate]).tolist() == [5.0, 0.75]
    assert BY_WEIGHT["pon"]([gate]).tolist() == [6.0, 1.25]


@pytest.mark.parametrize(
    ("remove", "kept"), [(0.1, 7373), (0.2, 6554), (0.3, 5735), (0.4, 4916), (0.5, 4096), (0.6, 3277)]
)
def test_the_published_widths_of_llama_3_2_1b(remove, kept):
    assert width(remove=remove).target(8192, 2048) == kept


def test_targets():
    assert width(expansion=2.4).target(8192, 2048) == 4916
    assert width(remove=0.4, multiple_of=64).target(8192, 2048) == 4928
    assert width(remove=0.4, multiple_of=128).target(8192, 2048) == 4992
    assert width(remove=0.5, multiple_of=128).target(8192, 2048) == 4096
    assert width(expansion=4).target(8192, 2048) == 8192
    with pytest.raises(Refusal, match=r"expansion 5 .* keeps 10240 neurons, but the model has 8192"):
        width(expansion=5).target(8192, 2048)
    assert width(expansion=1e-9).target(8192, 2048) == 1
    assert width(expansion=1e-9, multiple_of=64).target(8192, 2048) == 64
    with pytest.raises(Refusal, match=r"multiple_of 128 keeps 1024 neurons, but the model has 1000"):
        width(remove=0.01, multiple_of=128).target(1000, 100)
    with pytest.raises(Refusal, match=r"remove 0.01 of 64 neurons is less than one; the smallest is 0.0156"):
        width(remove=0.01).target(64, 32)


@given(st.integers(1, 3000), st.floats(0, 0.99) | st.just(1 - 1e-12), st.integers(1, 130))
def test_at_most_the_given_share_is_removed_and_less_than_a_multiple_short_of_it(
    neurons, remove, multiple_of
):
    try:
        count = width(remove=remove, multiple_of=multiple_of).target(neurons, 10)
    except Refusal:
        return
    assert count % multiple_of == 0 and 0 < count <= neurons
    assert neurons * (1 - remove) - 1e-3 <= count < neurons * (1 - remove) + multiple_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of remove and expansion"),
        ({"remove": 0.5, "expansion": 2.0}, "give exactly one of remove and expansion"),
        ({"remove": 1.0}, "less than 1"),
        ({"remove": 0.5, "importance": "random"}, "importance random needs a seed"),
        ({"remove": 0.5, "seed": 1}, "only importance random has a seed"),
        ({"remove": 0.5, "importance": "llm-bip"}, "importance llm-bip is measured on text"),
        ({"remove": 0.5, "importance": "activation"}, "importance activation is measured on text"),
        ({"remove": 0.5, "calibration": TEXT}, "importance ppm reads no text"),
        ({"remove": 0.5, "ignore": ("mlp.up_proj",)}, "ignore must be left out"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        width(**options)


def test_a_random_choice_depends_on_the_seed_and_the_block():
    def kept(seed: int) -> list[list[int]]:
        model = families.model("llama")
        cuts, _, _ = plan(width(importance="random", seed=seed, remove=0.5), model)
        return [cuts[f"model.layers.{i}.mlp.down_proj.weight"][1].tolist() for i in range(2)]

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)
    assert kept(0)[0] != kept(0)[1]


def test_a_config_whose_hidden_size_equals_the_width(tmp_path):
    """The setting for the width is not the first with its value."""
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.intermediate_size = config.max_position_embeddings = config.hidden_size
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    cuts, changes, _ = plan(width(remove=0.5), model)
    assert changes == {"intermediate_size": 16}
    shrink(model, cuts, changes)
    assert reloaded(model, tmp_path).config.intermediate_size == 16


RECIPE = {"source": "base/tiny", "method": "width", "remove": 0.4, "multiple_of": 8, "calibration": NONE}


def test_zeros_sizes_and_bytes(workspace):
    """A sparse source stays sparse, the record counts what is there, and two runs write the same bytes."""
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT}
    bip = RECIPE | {"source": "prune/wanda", "importance": "llm-bip", "calibration": TEXT}
    chosen = params("llama", {"prune/wanda": wanda, "prune/made": bip})
    do(chosen)
    folder = Path("data/models/prune/made")
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    stored, source = load_file(folder / "model.safetensors"), load("prune/wanda")
    for block in range(2):
        name = f"model.layers.{block}.mlp."
        up, dense = stored[f"{name}up_proj.weight"], source.get_parameter(f"{name}up_proj.weight")
        assert up.shape == (40, 32) and stored[f"{name}down_proj.weight"].shape == (32, 40)
        places = [(dense == row).all(1).nonzero()[0].item() for row in up]
        assert places == sorted(places)
        for other in ("gate_proj.weight", "down_proj.weight"):
            weight = source.get_parameter(name + other)
            cut = weight[places] if "gate" in other else weight[:, places]
            assert torch.equal(stored[name + other], cut)
    pruned, facts = load("prune/made"), record("prune/made")
    weights = [linear.weight for linear in linears(pruned)]
    assert facts["num_parameters"] == sum(p.numel() for p in pruned.parameters())
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert facts["sparsity"] == zeros / sum(weight.numel() for weight in weights) > 0.4
    assert facts["bytes_on_disk"] == (folder / "model.safetensors").stat().st_size
    assert facts["notes"]["prune/made"]["width"] == {"before": 64, "after": 40}
    prune(chosen, "made")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


def test_group_size_is_checked_on_the_smaller_model(workspace):
    """in_features are those of the base, so widths after a cut are checked when the model is there."""
    rtn = {"source": "prune/narrow", "method": "rtn", "bits": 4, "group_size": 40, "calibration": NONE}
    narrow = RECIPE | {"importance": "pon"}
    chosen = params("llama", {"prune/narrow": narrow, "quantize/made": rtn})
    with pytest.raises(Refusal, match=r"group_size 40 does not divide the input width of 12 linears"):
        do(chosen)
    fitting = params("llama", {"prune/narrow": narrow, "quantize/made": rtn | {"group_size": 8}})
    do(fitting)
    assert record("quantize/made")["layout"] == "pack-quantized"
    with pytest.raises(Refusal, match="group_size: 40 does not divide 32, 64"):
        params("llama", {"quantize/made": rtn | {"source": "base/tiny"}})

"""Width pruning: the dense model without those neurons, as a smaller plain checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Phi3Config

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.shape import anatomy
from stages.pruning.shape.shrink import shrink
from stages.pruning.shape.shrinker import change_bound, measure_inputs, most_important
from stages.pruning.shape.width import BY_WEIGHT, Width
from tests import families, pipeline
from tests.pipeline import NONE, TEXT, do, load, params, record

NAMES = {
    "llama": ["gate_proj", "up_proj", "down_proj"], "qwen3": ["gate_proj", "up_proj", "down_proj"],
    "gemma3": ["gate_proj", "up_proj", "down_proj"], "mistral": ["gate_proj", "up_proj", "down_proj"],
    "opt": ["fc1", "fc2"], "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"], "gpt2": ["c_fc", "c_proj"],
}  # fmt: skip
KEYS = {"opt": "ffn_dim", "gpt2": "n_inner"}
WINDOWS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(3))


def width(**options: Any) -> Width:
    options = {"importance": "ppm", "calibration": NONE} | options
    return Width(source="base/m", method="width", **options)


def planned(recipe: Width, model: torch.nn.Module) -> Any:
    """What `recipe` keeps of `model`, where it reads no text."""
    return recipe.plan(model, recipe.parts(model), {})


def full(family: str) -> torch.nn.Module:
    """A tiny model in fp32, every linear of a size that matters, its biases drawn: fresh ones are zero."""
    made = families.model(family).float()
    for linear in linears(made):
        linear.weight.mul_(8)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=draw) / 4
    return made


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


def reloaded(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_dry_run_finds_the_mlp(family):
    model = families.model(family)
    before = logits(model)
    for name, part in anatomy.mlps(model).items():
        found = [one.name.removeprefix(name).rpartition(".")[2] for one in [*part.readers, part.writer]]
        assert found == NAMES[family]
        assert part.width == (128 if family == "gpt2" else 64)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("importance", ["ppm", "llm-bip"])
def test_it_is_the_dense_model_with_those_neurons_silent(family, importance, tmp_path):
    dense = full(family)
    options = {} if importance == "ppm" else {"calibration": TEXT}
    recipe = width(importance=importance, remove=0.3, **options)
    parts = anatomy.mlps(dense)
    loudness = measure_inputs(dense, parts, WINDOWS, 2, "width") if options else {}
    cuts, changes, notes = recipe.plan(dense, parts, loudness)
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
    artifact = "prune/made"
    do(params(family, {artifact: {"source": "base/tiny", "method": "width", "importance": "vow",
                                  "calibration": NONE, **options}}))  # fmt: skip
    base, made = load("base/tiny"), load(artifact)
    assert made.config.to_diff_dict() == base.config.to_diff_dict()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, made.get_parameter(name)), name


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


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 6))
def test_the_bound_is_the_change_of_the_mlps_output_without_the_neuron(seed, neurons, out):
    draw = torch.Generator().manual_seed(seed)
    inside = torch.randn(20, neurons, generator=draw)
    down = torch.randn(out, neurons, generator=draw)
    bound = change_bound(down, inside.square().mean(0).sqrt())
    for i in range(neurons):
        without = inside.clone()
        without[:, i] = 0
        change = (inside @ down.T - without @ down.T).square().sum(1).mean().sqrt()
        assert float(bound[i]) == pytest.approx(float(change), rel=1e-3, abs=1e-5)


def test_what_is_measured_is_the_dense_models_inputs():
    model = full("llama")
    seen = []
    part = anatomy.mlps(model)["model.layers.1"]
    part.writer.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    expected = seen[0].reshape(-1, 64).double().square().mean(0).sqrt().float()
    for batch_size in (None, 1, 2):
        again = full("llama")
        loudness = measure_inputs(again, anatomy.mlps(again), WINDOWS, batch_size, "w")["model.layers.1"]
        assert torch.allclose(loudness, expected, rtol=1e-4)
    recipe = width(importance="activation", remove=0.5, calibration=TEXT)
    assert torch.equal(recipe.scores(part, loudness, "model.layers.1"), loudness)


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
def test_never_more_is_removed_than_asked_for_nor_a_multiple_less(neurons, remove, multiple_of):
    try:
        count = width(remove=remove, multiple_of=multiple_of).target(neurons, 10)
    except Refusal:
        return
    assert count % multiple_of == 0 and 0 < count <= neurons
    assert neurons * (1 - remove) - 1e-3 <= count < neurons * (1 - remove) + multiple_of


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_the_highest_are_kept_in_order_and_of_those_alike_the_lowest_go(values, data):
    count = data.draw(st.integers(0, len(values)))
    kept = most_important(torch.tensor(values, dtype=torch.float32), count)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert kept.tolist() == sorted(order[len(values) - count :])
    assert kept.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "said"),
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
def test_bad_settings_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        width(**options)


def test_a_random_choice_depends_on_the_seed_and_the_block():
    def chosen(seed: int) -> list[list[int]]:
        model = families.model("llama")
        cuts, _, _ = planned(width(importance="random", seed=seed, remove=0.5), model)
        return [cuts[f"model.layers.{i}.mlp.down_proj.weight"][1].tolist() for i in range(2)]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert chosen(0)[0] != chosen(0)[1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MixtralConfig, r"MixtralForCausalLM has matrices .*experts"),
        (Phi3Config, r"Phi3ForCausalLM: model\.layers\.0 has 0 MLPs with one feature a neuron; a block must"),
    ],
)
def test_blocks_that_are_not_plain_are_refused_by_name(config, said):
    """Experts that are no linears, and gate and up in one."""
    other = AutoModelForCausalLM.from_config(
        config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(Refusal, match=said):
        planned(width(remove=0.5), other)


def test_a_weight_that_is_not_a_number_is_refused():
    model = families.model("llama")
    parts = anatomy.mlps(model)
    linears(model)[5].weight[0, 0] = float("nan")
    with pytest.raises(Refusal, match=r"NaN or infinite values in model\.layers\.0\.mlp\.up_proj\.weight"):
        measure_inputs(model, parts, WINDOWS, None, "width")


def test_a_config_whose_hidden_size_equals_the_width(tmp_path):
    """The number that rules the width is not the first that has its value."""
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.intermediate_size = config.max_position_embeddings = config.hidden_size
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    cuts, changes, _ = planned(width(remove=0.5), model)
    assert changes == {"intermediate_size": 16}
    shrink(model, cuts, changes)
    assert reloaded(model, tmp_path).config.intermediate_size == 16


RECIPE = {"source": "base/tiny", "method": "width", "remove": 0.4, "multiple_of": 8, "calibration": NONE}


def test_zeros_sizes_and_bytes(workspace):
    """A sparse source stays sparse; the record counts what is there; two runs write the same bytes."""
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
            whole = source.get_parameter(name + other)
            assert torch.equal(stored[name + other], whole[places] if "gate" in other else whole[:, places])
    told = record("prune/made")
    weights = [linear.weight for linear in linears(load("prune/made"))]
    assert told["num_parameters"] == sum(p.numel() for p in load("prune/made").parameters())
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert told["sparsity"] == zeros / sum(weight.numel() for weight in weights) > 0.4
    assert told["bytes_on_disk"] == (folder / "model.safetensors").stat().st_size
    assert told["notes"]["prune/made"]["width"] == {"before": 64, "after": 40}
    pipeline.prune(chosen, "made")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


def test_group_size_is_asked_of_the_smaller_model(workspace):
    """in_features say nothing of what was cut: what does not divide is told when the model is there."""
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


def test_hidden_states_that_overflow_are_named_and_not_taken_for_attentions(workspace):
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[0].mlp.down_proj.weight.data.fill_(1e38)
    model.model.layers[0].post_attention_layernorm.weight.data.fill_(1e38)
    model.save_pretrained("data/models/base/tiny")
    recipe = {
        "source": "base/tiny",
        "method": "width",
        "importance": "ppm",
        "remove": 0.5,
        "calibration": NONE,
    }
    chosen = params("llama", {"prune/made": recipe})
    with pytest.raises(Refusal, match=r"NaN or infinite inputs of model\.layers\.1\.self_attn\.q_proj"):
        chosen.prune["made"].execute("prune/made", chosen.run)
    assert not Path("data/models/prune").exists()

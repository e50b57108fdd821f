"""Head pruning: the dense model without those heads, as a smaller plain checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    DiffLlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.shape import anatomy
from stages.pruning.shape.attention import HeadLayout
from stages.pruning.shape.heads import Heads
from stages.pruning.shape.shrink import shrink
from stages.pruning.shape.shrinker import measure_inputs
from tests import families, pipeline
from tests.pipeline import NONE, TEXT, do, load, params, record

SERVED = ["llama", "qwen3", "gemma3", "mistral"]
WINDOWS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(3))


def heads(**options: Any) -> Heads:
    options = {"importance": "magnitude", "calibration": NONE} | options
    return Heads(source="base/m", method="heads", **options)


def planned(recipe: Heads, model: torch.nn.Module) -> Any:
    """What `recipe` keeps of `model`, where it reads no text."""
    return recipe.plan(model, recipe.parts(model), {})


def grouped(family: str) -> PreTrainedModel:
    """Eight query heads of 4 features in four groups, in fp32, of a size that matters, with biases."""
    config = copy.deepcopy(families.CONFIGS[family])
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 4
    if hasattr(config, "attention_bias"):
        config.attention_bias = True
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for linear in linears(made):
        linear.weight.mul_(8)
        if linear.module.bias is not None:
            torch.nn.init.normal_(linear.module.bias, std=0.3)
    return made


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_dry_run_finds_the_attention(family):
    names = {
        "opt": ["k_proj", "v_proj", "q_proj", "out_proj"], "gpt_neox": ["query_key_value", "dense"],
        "gpt2": ["c_attn", "c_proj"],
    }.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"])  # fmt: skip
    for name, part in anatomy.attentions(families.model(family)).items():
        found = [one.name.removeprefix(name).rpartition(".")[2] for one in [*part.readers, part.writer]]
        assert found == names
        assert part.width == 32


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("unit", ["groups", "queries"])
@pytest.mark.parametrize("importance", ["magnitude", "llm-bip"])
def test_it_is_the_dense_model_with_those_heads_silent(family, unit, importance, tmp_path):
    dense, small = grouped(family), grouped(family)
    options = {} if importance == "magnitude" else {"calibration": TEXT}
    parts = anatomy.attentions(dense)
    loudness = measure_inputs(dense, parts, WINDOWS, None, "heads") if options else {}
    recipe = heads(importance=importance, unit=unit, remove=0.5, **options)
    cuts, changes, notes = recipe.plan(dense, parts, loudness)
    assert changes == {
        "num_attention_heads": 4, "head_dim": 4, "num_key_value_heads": 2 if unit == "groups" else 4,
    }  # fmt: skip
    assert {key: notes["heads"][key] for key in ("before", "after")} == {"before": 8, "after": 4}
    shrink(small, cuts, changes)
    for name, part in parts.items():
        kept = notes["heads"]["kept"][name]
        assert kept == sorted(kept) and len(kept) == 4
        left = [sum(head // 2 == group for head in kept) for group in range(4)]
        assert sorted(left) == [0, 0, 2, 2] if unit == "groups" else left == [1, 1, 1, 1]
        for head in set(range(8)) - set(kept):
            part.writer.weight[:, head * 4 : head * 4 + 4] = 0
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.allclose(logits(again), logits(dense), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(again), logits(grouped(family)), atol=1e-2)
    tokens = [
        again.generate(WINDOWS[:1, :4], max_new_tokens=6, do_sample=False, use_cache=cache).tolist()
        for cache in (True, False)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("family", SERVED)
def test_removing_nothing_changes_nothing(family, workspace):
    recipe = {"source": "base/tiny", "method": "heads", "importance": "magnitude", "calibration": NONE}
    do(params(family, {"prune/made": recipe | {"remove": 0.0}, "prune/again": recipe | {"keep": 4}}))
    base = load("base/tiny")
    for artifact in ("prune/made", "prune/again"):
        made = load(artifact)
        assert made.config.to_diff_dict() == base.config.to_diff_dict()
        for name, parameter in base.named_parameters():
            assert torch.equal(parameter, made.get_parameter(name)), name


def test_inputs_that_are_too_large_for_sums_matter_only_to_what_reads_them():
    model = grouped("llama")
    model.model.layers[-1].post_attention_layernorm.weight.data[3] = 2e19
    loudness = measure_inputs(model, anatomy.attentions(model), WINDOWS, None, "heads")
    assert loudness.keys() == anatomy.attentions(model).keys()
    assert all(heard.isfinite().all() and heard.any() for heard in loudness.values())


@pytest.mark.parametrize("unit", ["groups", "queries"])
def test_scores_by_hand(unit):
    """Sums over single weights and features, written out."""
    model, shape = grouped("llama").requires_grad_(False), HeadLayout(8, 4, 4)
    parts = anatomy.attentions(model)
    part = parts["model.layers.1"]
    heard = measure_inputs(model, parts, WINDOWS, 1, "heads")["model.layers.1"]
    loud = heard.tolist()
    block = model.model.layers[1].self_attn
    o = block.o_proj.weight
    for unit_number in range(4 if unit == "groups" else 8):
        members = [2 * unit_number, 2 * unit_number + 1] if unit == "groups" else [unit_number]
        features = [4 * head + i for head in members for i in range(4)]
        squares = sum(float((block.q_proj.weight[f] ** 2).sum() + (o[:, f] ** 2).sum()) for f in features)
        if unit == "groups":
            shared = range(4 * unit_number, 4 * unit_number + 4)
            for one in (block.k_proj, block.v_proj):
                squares += sum(float((one.weight[f] ** 2).sum()) for f in shared)
        expected = {
            "magnitude": squares**0.5,
            "activation": sum(loud[f] ** 2 for f in features) ** 0.5,
            "llm-bip": sum(loud[f] * float(o[:, f].norm()) for f in features),
        }
        for importance, value in expected.items():
            text = NONE if importance == "magnitude" else TEXT
            recipe = heads(importance=importance, unit=unit, remove=0.5, calibration=text)
            scores = recipe.scores(part, heard, shape, "model.layers.1")
            assert float(scores[unit_number]) == pytest.approx(value, rel=1e-4)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4))
def test_the_bound_bounds_the_change_of_the_attentions_output(seed, features, out):
    draw = torch.Generator().manual_seed(seed)
    inside, o = torch.randn(20, features, generator=draw), torch.randn(out, features, generator=draw)
    change = (inside @ o.T).square().sum(1).mean().sqrt()
    bound = sum(inside[:, f].square().mean().sqrt() * o[:, f].norm() for f in range(features))
    assert change <= bound * (1 + 1e-5)


def test_targets():
    shape = HeadLayout(12, 4, 8)
    assert heads(remove=0.5).target(shape) == HeadLayout(6, 2, 8)
    assert heads(remove=0.4).target(shape) == HeadLayout(9, 3, 8)
    assert heads(keep=3).target(shape) == HeadLayout(3, 1, 8)
    assert heads(remove=0.5, unit="queries").target(shape) == HeadLayout(8, 4, 8)
    assert heads(keep=4, unit="queries").target(shape) == HeadLayout(4, 4, 8)
    assert heads(keep=12).target(shape) == shape
    assert heads(remove=0.9999999999).target(shape) == HeadLayout(3, 1, 8)
    assert heads(remove=0.9999999999, unit="queries").target(shape) == HeadLayout(4, 4, 8)
    with pytest.raises(Refusal, match=r"keep 4 of 12 query heads \(4 groups of 3\): .*: 3, 6, 9, 12"):
        heads(keep=4).target(shape)
    with pytest.raises(Refusal, match="allowed with unit queries: 4, 8, 12"):
        heads(keep=16, unit="queries").target(shape)
    with pytest.raises(Refusal, match=r"remove 0\.2 of 4 groups is less than one; the smallest is 0\.25"):
        heads(remove=0.2).target(shape)
    with pytest.raises(Refusal, match="there is only one of the groups, and it must stay"):
        heads(remove=0.5).target(HeadLayout(4, 1, 8))
    with pytest.raises(Refusal, match="every query head has its own keys and values"):
        heads(keep=2, unit="queries").target(HeadLayout(4, 4, 8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give exactly one of remove and keep"),
        ({"remove": 0.5, "keep": 2}, "give exactly one of remove and keep"),
        ({"keep": 0}, "greater than or equal to 1"),
        ({"keep": 2, "importance": "random"}, "importance random needs a seed"),
        ({"keep": 2, "importance": "llm-bip"}, "importance llm-bip is measured on text"),
        ({"keep": 2, "importance": "ppm"}, "Input should be 'magnitude'"),
        ({"keep": 2, "unit": "layers"}, "Input should be 'groups' or 'queries'"),
    ],
)
def test_bad_settings_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        heads(**options)


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_config_that_cannot_say_fewer_heads(family, keep):
    model = families.model(family)
    said = (
        f"{type(model).__name__} cannot lose heads: its config cannot describe fewer heads of 8 features, with "
        r"which .* would be \[32, 32] instead"
    )
    with pytest.raises(Refusal, match=said):
        planned(heads(keep=keep), model)


def test_a_number_that_a_config_refuses_is_told_with_those_it_does_not():
    with pytest.raises(Refusal, match=r"LlamaForCausalLM cannot have 6 heads: .*multiple.*; allowed: 2, 4\."):
        planned(heads(keep=6), grouped("llama"))
    _, changes, _ = planned(heads(keep=6), grouped("mistral"))
    assert changes["num_attention_heads"] == 6


def test_fused_heads_are_refused_by_name():
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, head_dim=8,
    )  # fmt: skip
    fused = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Refusal, match=r"Phi3ForCausalLM cannot lose heads: .*qkv_proj holds more than"):
        planned(heads(keep=2), fused)


def paired(kind: type[PreTrainedConfig]) -> PreTrainedModel:
    """Eight query heads in four groups, in a family whose heads are not apart."""
    config = kind(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=0, head_dim=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("unit", ["groups", "queries"])
@pytest.mark.parametrize(("kind", "linear"), [(BitNetConfig, "[qkv]"), (DiffLlamaConfig, "[qv]")])
def test_heads_that_reach_each_other_are_refused_by_name(kind, linear, unit):
    family = kind.__name__.removesuffix("Config")
    said = rf"^{family}ForCausalLM cannot lose heads\: the output of .*layers\.0\.self_attn\.{linear}_proj for the first"
    with pytest.raises(Refusal, match=said):
        planned(heads(keep=4, unit=unit), paired(kind))


@pytest.mark.parametrize("family", SERVED)
def test_heads_that_are_apart_reach_the_heads_of_their_group(family):
    model = grouped(family)
    far = anatomy.reach(model, anatomy.attentions(model), 4)
    reached = {"q_proj": 4, "k_proj": 8, "v_proj": 8}
    assert far == {
        f"model.layers.{number}.self_attn.{name}": reached[name] for number in range(2) for name in reached
    }


WHOLE: dict[str, dict[str, Any]] = {
    "heads": {"importance": "magnitude", "remove": 0.5},
    "width": {"importance": "ppm", "remove": 0.5},
    "depth": {"metric": "reverse", "blocks": 1},
    "stepwise": {
        "sparsity": 0.5, "max_rise": 0.5, "held_out": 1, "policy": {"kind": "rules"}, "calibration": TEXT,
    },
    "resp": {
        "sparsity": 0.5, "steps": 2, "scope": "row",
        "calibration": TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4},
    },
}  # fmt: skip
"""Methods that have all of the source in memory."""


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("method", WHOLE)
def test_what_is_no_number_outside_the_linears_is_refused_by_name(method, name, workspace, monkeypatch):
    recipe = {"source": "base/tiny", "method": method, "calibration": NONE} | WHOLE[method]
    chosen = params("llama", {f"prune/{method}": recipe})
    do(chosen, [])
    broken = families.model("llama")
    broken.get_parameter(name).data[0] = float("nan")
    monkeypatch.setattr("stages.model.source.load_model", lambda *_, **__: broken)
    with pytest.raises(Refusal, match=f"^base/tiny: NaN or infinite values in {name}; nothing was written"):
        pipeline.STAGES["prune"](chosen, method)


def test_zeros_sizes_and_bytes(workspace):
    """A sparse source stays sparse; the record counts what is there; two runs write the same bytes."""
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT}
    recipe = {
        "source": "prune/wanda", "method": "heads", "importance": "activation", "keep": 2,
        "calibration": TEXT,
    }  # fmt: skip
    chosen = params("gemma3", {"prune/wanda": wanda, "prune/made": recipe})
    do(chosen)
    folder = Path("data/models/prune/made")
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    made, source, told = load("prune/made"), load("prune/wanda"), record("prune/made")
    for number in range(2):
        ours, theirs = made.model.layers[number].self_attn, source.model.layers[number].self_attn
        (first_kept, _) = kept = told["notes"]["prune/made"]["heads"]["kept"][f"model.layers.{number}"]
        assert kept in ([0, 1], [2, 3])
        queries, keys = slice(8 * first_kept, 8 * first_kept + 16), slice(4 * first_kept, 4 * first_kept + 8)
        assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[queries])
        assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight[keys])
        assert torch.equal(ours.v_proj.weight, theirs.v_proj.weight[keys])
        assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight[:, queries])
    weights = [linear.weight for linear in linears(made)]
    assert told["num_parameters"] == sum(p.numel() for p in made.parameters())
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert told["sparsity"] == zeros / sum(weight.numel() for weight in weights) > 0.4
    pipeline.prune(chosen, "made")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


def test_heads_and_neurons_and_codes(workspace):
    """Structured steps follow one another and what quantizes comes after."""
    steps = {
        "prune/heads": {
            "source": "base/tiny", "method": "heads", "importance": "random", "seed": 1, "keep": 2,
            "unit": "queries", "calibration": NONE,
        },
        "prune/width": {
            "source": "prune/heads", "method": "width", "importance": "l2", "expansion": 1.0,
            "calibration": NONE,
        },
        "quantize/rtn": {
            "source": "prune/width", "method": "rtn", "bits": 4, "group_size": 16, "calibration": NONE,
        },
        "prune/after": {
            "source": "quantize/rtn", "method": "width", "importance": "ppm", "remove": 0.5,
            "calibration": NONE,
        },
    }  # fmt: skip
    do(params("qwen3", steps), list(steps))
    assert record("quantize/rtn")["layout"] == "pack-quantized"
    made = pipeline.dense(load("prune/after"))
    assert record("prune/after")["layout"] == "dense"
    assert (made.config.num_attention_heads, made.config.intermediate_size) == (2, 16)

"""Head pruning: the dense model without those heads, as a smaller plain checkpoint."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.shape import anatomy
from stages.pruning.shape.attention import HeadLayout
from stages.pruning.shape.shrink import shrink
from stages.pruning.shape.shrinker import measure_inputs
from tests.pipeline import NONE, TEXT, dense, do, load, params, prune, record
from tests.shapes import WINDOWS, grouped, heads, logits, reloaded

pytestmark = [pytest.mark.numerics, pytest.mark.device]
SERVED = ["llama", "qwen3", "gemma3", "mistral"]


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("unit", ["groups", "queries"])
@pytest.mark.parametrize("importance", ["magnitude", "llm-bip"])
def test_the_result_is_the_dense_model_with_those_heads_silent(family, unit, importance, tmp_path):
    full, small = grouped(family), grouped(family)
    options = {} if importance == "magnitude" else {"calibration": TEXT}
    parts = anatomy.attentions(full)
    rms = measure_inputs(full, parts, WINDOWS, None, "heads") if options else {}
    recipe = heads(importance=importance, unit=unit, remove=0.5, **options)
    cuts, changes, notes = recipe.plan(full, parts, rms)
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
    again = reloaded(small, tmp_path)
    assert torch.allclose(logits(again), logits(full), rtol=1e-4, atol=1e-4)
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
        pruned = load(artifact)
        assert pruned.config.to_diff_dict() == base.config.to_diff_dict()
        for name, parameter in base.named_parameters():
            assert torch.equal(parameter, pruned.get_parameter(name)), name


@pytest.mark.parametrize("unit", ["groups", "queries"])
def test_scores_by_hand(unit):
    """Sums over single weights and features, written out."""
    model, layout = grouped("llama").requires_grad_(False), HeadLayout(8, 4, 4)
    parts = anatomy.attentions(model)
    part = parts["model.layers.1"]
    rms = measure_inputs(model, parts, WINDOWS, 1, "heads")["model.layers.1"]
    block = model.model.layers[1].self_attn
    o = block.o_proj.weight
    for number in range(4 if unit == "groups" else 8):
        members = [2 * number, 2 * number + 1] if unit == "groups" else [number]
        features = [4 * head + i for head in members for i in range(4)]
        squares = sum(float((block.q_proj.weight[f] ** 2).sum() + (o[:, f] ** 2).sum()) for f in features)
        if unit == "groups":
            shared = range(4 * number, 4 * number + 4)
            for linear in (block.k_proj, block.v_proj):
                squares += sum(float((linear.weight[f] ** 2).sum()) for f in shared)
        expected = {
            "magnitude": squares**0.5,
            "activation": sum(float(rms[f]) ** 2 for f in features) ** 0.5,
            "llm-bip": sum(float(rms[f]) * float(o[:, f].norm()) for f in features),
        }
        for importance, value in expected.items():
            calibration = NONE if importance == "magnitude" else TEXT
            recipe = heads(importance=importance, unit=unit, remove=0.5, calibration=calibration)
            scores = recipe.scores(part, rms, layout, "model.layers.1")
            assert float(scores[number]) == pytest.approx(value, rel=1e-4)


def test_targets():
    layout = HeadLayout(12, 4, 8)
    assert heads(remove=0.5).target(layout) == HeadLayout(6, 2, 8)
    assert heads(remove=0.4).target(layout) == HeadLayout(9, 3, 8)
    assert heads(keep=3).target(layout) == HeadLayout(3, 1, 8)
    assert heads(remove=0.5, unit="queries").target(layout) == HeadLayout(8, 4, 8)
    assert heads(keep=4, unit="queries").target(layout) == HeadLayout(4, 4, 8)
    assert heads(keep=12).target(layout) == layout
    assert heads(remove=0.9999999999).target(layout) == HeadLayout(3, 1, 8)
    assert heads(remove=0.9999999999, unit="queries").target(layout) == HeadLayout(4, 4, 8)
    with pytest.raises(Refusal, match=r"keep 4 of 12 query heads \(4 groups of 3\): .*: 3, 6, 9, 12"):
        heads(keep=4).target(layout)
    with pytest.raises(Refusal, match="allowed with unit queries: 4, 8, 12"):
        heads(keep=16, unit="queries").target(layout)
    with pytest.raises(Refusal, match=r"remove 0\.2 of 4 groups is less than one; the smallest is 0\.25"):
        heads(remove=0.2).target(layout)
    with pytest.raises(Refusal, match="all query heads share one key and value head; remove some"):
        heads(remove=0.5).target(HeadLayout(4, 1, 8))
    with pytest.raises(Refusal, match="every query head has its own keys and values"):
        heads(keep=2, unit="queries").target(HeadLayout(4, 4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        heads(**options)


def test_zeros_sizes_and_bytes(workspace):
    """A sparse source stays sparse, the record counts what is there, and two runs write the same bytes."""
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT}
    recipe = {
        "source": "prune/wanda", "method": "heads", "importance": "activation", "keep": 2,
        "calibration": TEXT,
    }  # fmt: skip
    chosen = params("gemma3", {"prune/wanda": wanda, "prune/made": recipe})
    do(chosen)
    folder = Path("data/models/prune/made")
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    pruned, source, facts = load("prune/made"), load("prune/wanda"), record("prune/made")
    for number in range(2):
        ours, theirs = pruned.model.layers[number].self_attn, source.model.layers[number].self_attn
        (first_kept, _) = kept = facts["notes"]["prune/made"]["heads"]["kept"][f"model.layers.{number}"]
        assert kept in ([0, 1], [2, 3])
        queries, keys = slice(8 * first_kept, 8 * first_kept + 16), slice(4 * first_kept, 4 * first_kept + 8)
        assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[queries])
        assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight[keys])
        assert torch.equal(ours.v_proj.weight, theirs.v_proj.weight[keys])
        assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight[:, queries])
    weights = [linear.weight for linear in linears(pruned)]
    assert facts["num_parameters"] == sum(p.numel() for p in pruned.parameters())
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert facts["sparsity"] == zeros / sum(weight.numel() for weight in weights) > 0.4
    prune(chosen, "made")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


def test_heads_and_neurons_and_codes(workspace):
    """Structured steps follow one another, with quantization between them."""
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
    pruned = dense(load("prune/after"))
    assert record("prune/after")["layout"] == "dense"
    assert (pruned.config.num_attention_heads, pruned.config.intermediate_size) == (2, 16)

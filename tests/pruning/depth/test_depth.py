"""Depth pruning: every recipe leaves what it says, and bad recipes are refused."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from stages.core.errors import Refusal
from stages.job.load import checked_params
from stages.model.blocks import blocks
from stages.pruning.depth.depth import Depth
from stages.pruning.depth.remove import output_projections
from tests import families, generators, project
from tests.deep import deep, logits, without, without_attention
from tests.pipeline import NONE, TEXT, dense, do, load, params, record

READS = {"metric": "perplexity", "calibration": TEXT}


def test_reverse_takes_the_last_blocks(source, prune):
    model = source(deep("llama"))
    assert prune(blocks=3)["notes"]["prune/made"] == {"removed": [3, 4, 5]}
    assert torch.equal(logits(load("prune/made")), logits(without(model, {3, 4, 5})))
    assert prune(blocks=3, keep=(5,))["notes"]["prune/made"] == {"removed": [2, 3, 4]}
    assert prune(blocks=5)["notes"]["prune/made"] == {"removed": [1, 2, 3, 4, 5]}


def test_weights_that_a_forward_would_halve_are_written_whole(source, prune):
    """RWKV halves those of its later blocks, and each attempt to remove blocks runs it."""
    config = AutoConfig.for_model("rwkv", **generators.CONFIGS["rwkv"] | {"num_hidden_layers": 4})
    torch.manual_seed(0)
    model = source(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    prune(blocks=1)
    for name, tensor in load("prune/made").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert load("prune/made").config.rescale_every == config.rescale_every == 1


@pytest.mark.parametrize("metric", ["block-influence", "angular", "perplexity", "shapley", "greedy"])
def test_a_recipe_removes_the_blocks_in_its_notes(metric, source, prune):
    model = source(deep("gemma3"))
    settings = {"metric": metric, "calibration": TEXT, "keep": (5,)}
    settings |= {"samples": 2} if metric == "shapley" else {}
    facts = prune(**settings)
    notes = facts["notes"]["prune/made"]
    assert len(notes["removed"]) == 2 and 5 not in notes["removed"]
    assert len(notes["steps"] if metric == "greedy" else notes["scores"]) == (2 if metric == "greedy" else 5)
    pruned = load("prune/made")
    assert torch.equal(logits(pruned), logits(without(model, notes["removed"])))
    assert facts["num_parameters"] == sum(p.numel() for p in pruned.parameters())
    file = Path("data/models/prune/made/model.safetensors")
    first = file.read_bytes()
    prune(**settings)
    assert file.read_bytes() == first


@pytest.mark.parametrize("family", families.CONFIGS)
def test_target_attention_zeroes_output_projections(family, source, prune):
    model = source(deep(family, 4))
    facts = prune(metric="block-influence", target="attention", calibration=TEXT)
    notes, pruned = facts["notes"]["prune/made"], load("prune/made")
    projections = output_projections(pruned)
    assert notes["zeroed"] == [projections[number].name for number in notes["removed"]]
    assert "no plain checkpoint leaves it out" in notes["attention"]
    zeros = sum(projections[number].weight.numel() for number in notes["removed"])
    inside = blocks(pruned)[0][0][:-2]
    total = sum(p.numel() for name, p in pruned.named_parameters() if p.ndim == 2 and inside in name)
    assert facts["sparsity"] == zeros / total
    assert torch.equal(logits(pruned), logits(without_attention(model, notes["removed"])))
    # An attention that is already zero does not count as removed again.
    again = {"artifact": "prune/again", "source": "prune/made", "target": "attention"}
    removed = prune(blocks=1, **again)["notes"]["prune/again"]["removed"]
    assert not set(removed) & set(notes["removed"])
    with pytest.raises(Refusal, match="only 2 are neither kept nor already zero"):
        prune(blocks=3, **READS, **again)


def test_a_packed_source_gives_a_dense_model_without_a_block(workspace):
    recipes = {
        "quantize/rtn": {
            "source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE,
        },
        "prune/after": {
            "source": "quantize/rtn", "method": "depth", "metric": "perplexity", "blocks": 1,
            "calibration": TEXT,
        },
    }  # fmt: skip
    do(params("qwen3", recipes), list(recipes))
    packed, pruned = dense(load("quantize/rtn")), load("prune/after")
    (removed,) = record("prune/after")["notes"]["prune/after"]["removed"]
    assert record("prune/after")["layout"] == "dense"
    (_, ours), (_, theirs) = blocks(pruned)[0], blocks(packed)[1 - removed]
    expected = dict(theirs.named_parameters())
    assert expected
    assert all(torch.equal(parameter, expected[name]) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "perplexity"}, "metric perplexity is measured on text; name a data set"),
        ({"replace_by_mean": True, "keep": (0,)}, "replace_by_mean is measured on text"),
        ({"calibration": TEXT}, "no part of this recipe reads text"),
        (READS | {"samples": 3}, "metric perplexity draws nothing; leave samples and seed out"),
        (READS | {"seed": 3}, "metric perplexity draws nothing; leave samples and seed out"),
        (READS | {"metric": "shapley"}, "metric shapley needs samples"),
        (READS | {"metric": "angular", "target": "attention"}, "compares runs of blocks"),
        (READS | {"replace_by_mean": True}, "add 0 to keep"),
        ({"keep": (1, 1)}, "names a block twice"),
        ({"ignore": ("mlp.gate",)}, "name blocks in keep instead"),
        (
            {"metric": "perplexity", "calibration": {"dataset": "a", "shots": 1}},
            "only metric greedy without replace_by_mean reads graded items",
        ),
        ({"blocks": 0}, "greater than or equal to 1"),
        ({"keep": (-1,)}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings, message):
    recipe = {"source": "base/deep", "method": "depth", "metric": "reverse", "blocks": 1, "calibration": NONE}
    with pytest.raises(ValidationError) as refusal:
        Depth(**recipe | settings)
    (only,) = refusal.value.errors()
    assert message in only["msg"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 4}, "only 3 of the 4 blocks"),
        (READS | {"blocks": 4}, "only 3 of the 4 blocks"),
        ({"keep": (1, 3), "blocks": 3}, "only 2 of the 4 blocks"),
        ({"keep": (4, 1, 9)}, "keep names 4, 9, but base/deep has only blocks 0 to 3"),
        (READS | {"target": "attention", "blocks": 5}, "only 4 of the 4 blocks"),
        (READS | {"metric": "angular", "blocks": 2, "keep": (1, 2)}, "keep leaves no run of 2 blocks"),
        (READS | {"calibration": TEXT | {"num_samples": 1, "sequence_length": 300}}, "256"),
    ],
)
def test_settings_that_do_not_fit_the_source_are_refused(settings, message, source, prune):
    source(deep("llama", 4))
    with pytest.raises(Refusal, match=message):
        prune(**settings)
    assert not Path("data/models/prune/made").exists()


@pytest.mark.parametrize(
    ("calibration", "train", "message"),
    [
        ({"dataset": "news", "shots": 1}, 4, "dataset: 'news' has no graded items; allowed: arith"),
        ({"dataset": "none", "shots": 1}, 4, "dataset: 'none' has no graded items; allowed: arith"),
        ({"dataset": "arithmetic", "shots": 1}, 0, "arithmetic keeps all its items for evaluation"),
        (
            {"dataset": "arithmetic", "shots": 2},
            4,
            "shots: 2 given; datasets.arithmetic has 1 few-shot examples",
        ),
    ],
)
def test_missing_items_are_refused_with_the_params(calibration, train, message, workspace):
    raw = project.params(Path("inputs"))
    raw["datasets"]["arithmetic"]["train"] = train
    recipe = {"source": "base/tiny", "method": "depth", "metric": "greedy", "blocks": 1}
    raw["prune"]["depth-1"] = recipe | {"calibration": {"dataset": "arithmetic", "shots": 1}}
    if train:
        checked_params(raw)
    raw["prune"]["depth-1"] = recipe | {"calibration": calibration}
    with pytest.raises(Refusal, match=f"prune.depth-1.*{message}"):
        checked_params(raw)

"""Any order of steps: lineage, and zeros that survive whatever comes after them."""

from pathlib import Path

import pytest
import torch

from stages.model.blocks import linears
from stages.model.checkpoint import zero_masks
from stages.quantization import rtn
from tests.pipeline import dense, do, load, params, record
from tests.recipes import GPTQ, LORA, MAGNITUDE, RANDOM, RTN, SPARSEGPT, WANDA, chain, run


def weights(artifact: str) -> dict[str, torch.Tensor]:
    """The block linears' weights as plain transformers gives them."""
    model = dense(load(artifact))
    return {
        linear.name: model.get_submodule(linear.name).weight.detach() for linear in linears(load("base/tiny"))
    }


@pytest.mark.parametrize(
    "steps",
    [
        [("quantize", RTN), ("prune", WANDA)],
        [("quantize", GPTQ), ("prune", MAGNITUDE)],
        [("prune", MAGNITUDE), ("prune", WANDA | {"sparsity": 0.75})],
        [("finetune", LORA), ("quantize", GPTQ)],
        [("quantize", RTN), ("finetune", LORA | {"requantize": False})],
        [("quantize", RTN), ("quantize", GPTQ | {"bits": 3})],
    ],
    ids=lambda steps: "-".join(f"{section}:{options['method']}" for section, options in steps),
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_order_runs_and_keeps_its_lineage(family, steps, workspace):
    artifacts = run(family, *steps)
    facts = record(artifacts[-1])
    assert facts["lineage"] == ["base/tiny", *artifacts]
    assert list(facts["recipes"]) == sorted(artifacts)
    assert [facts["recipes"][a]["method"] for a in artifacts] == [options["method"] for _, options in steps]
    last = artifacts[-1].split("/")[0]
    packed = "pack-quantized" if family == "llama" else "fake_quantized"
    assert facts["layout"] == (packed if last == "quantize" else "dense")
    assert all(weight.isfinite().all() for weight in weights(artifacts[-1]).values())
    if last == "prune":
        assert facts["sparsity"] == pytest.approx(steps[-1][1]["sparsity"], abs=0.01)


@pytest.mark.parametrize(
    "again", [MAGNITUDE, MAGNITUDE | {"scope": "global"}, WANDA, SPARSEGPT, RANDOM],
    ids=lambda options: f"{options['method']}-{options.get('scope', '')}",
)  # fmt: skip
@pytest.mark.parametrize("first", [("prune", RANDOM), ("quantize", RTN | {"bits": 2})])
@pytest.mark.parametrize("sparsity", [0.25, 0.75])
def test_pruning_what_has_zeros_already_counts_them(sparsity, first, again, workspace):
    """A higher sparsity adds zeros to those already there; a lower sparsity removes none."""
    earlier, later = run("llama", first, ("prune", again | {"sparsity": sparsity}))
    before, after = weights(earlier), weights(later)
    kept = sum(int((weight == 0).sum()) for weight in before.values())
    assert all((after[name][weight == 0] == 0).all() for name, weight in before.items())
    zeros = sum(int((weight == 0).sum()) for weight in after.values())
    total = sum(weight.numel() for weight in before.values())
    assert zeros >= max(kept, total * sparsity)
    if again.get("scope") == "global" or first[1] is RANDOM:
        assert zeros == max(kept, total * sparsity)
    assert record(later)["sparsity"] == zeros / total


def test_packed_weights_are_unpacked_exactly_for_the_next_step(workspace):
    first, second = run("llama", ("quantize", RTN), ("prune", MAGNITUDE | {"sparsity": 0.0}))
    before, after = weights(first), weights(second)
    assert len(before) == 14
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("then", [("quantize", RTN), ("quantize", GPTQ), ("finetune", LORA)])
def test_every_zero_of_a_pruned_model_is_kept(family, then, workspace):
    first, second = run(family, ("prune", WANDA), then)
    before, after = weights(first), weights(second)
    zeros = sum(int((weight == 0).sum()) for weight in before.values())
    assert zeros == sum(weight.numel() for weight in before.values()) / 2
    for name, weight in before.items():
        assert (after[name][weight == 0] == 0).all()
        assert not torch.equal(after[name], weight)
    assert record(second)["sparsity"] >= record(first)["sparsity"] == 0.5


def test_zeros_survive_tuning_and_then_quantization(workspace):
    artifacts = run("llama", ("prune", WANDA), ("finetune", LORA), ("quantize", GPTQ))
    first, *_, last = map(weights, artifacts)
    assert all((last[name][weight == 0] == 0).all() for name, weight in first.items())


def test_a_lost_zero_stops_the_stage(workspace, monkeypatch):
    honest = rtn.RTN.weights

    def forgetful(self, weight, statistic):
        codes = honest(self, weight, statistic)
        codes.codes[codes.codes == 0] = 1
        return codes

    monkeypatch.setattr(rtn.RTN, "weights", forgetful)
    with pytest.raises(AssertionError, match=r"q_proj: \d+ of 512 zeros were lost in writing"):
        run("llama", ("prune", WANDA), ("quantize", RTN))
    assert not Path("data/models/quantize/step-1").exists()


def test_masks_are_those_of_the_source(workspace):
    (first,) = run("llama", ("prune", WANDA))
    masks = zero_masks(linears(load(first)))
    assert {int(mask.sum()) / mask.numel() for mask in masks.values()} == {0.5}


def test_a_noise_candidate_is_its_source_byte_for_byte(workspace):
    recipes = chain(("quantize", RTN)) | {"noise/again": {"source": "quantize/step-0", "batch_size": 3}}
    chosen = params("llama", recipes)
    do(chosen, list(recipes))
    source, copy = Path("data/models/quantize/step-0"), Path("data/models/noise/again")
    files = sorted(path.name for path in source.iterdir())
    assert files == sorted(path.name for path in copy.iterdir())
    for name in files:
        if name != "artifact.json":
            assert (source / name).read_bytes() == (copy / name).read_bytes()
    assert record("noise/again") == record("quantize/step-0") | {
        "artifact": "noise/again",
        "lineage": ["base/tiny", "quantize/step-0", "noise/again"],
        "batch_size": 3,
    }

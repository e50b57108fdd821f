"""Error by block: against hooks on the two written models, for methods of both kinds."""

import pytest
import torch

from stages.compress.drift import MOST_TOKENS, error_note, sample_windows
from stages.corpus.windows import Calibration, Windows, calibration_windows
from stages.model.blocks import blocks, forward
from tests import families
from tests.pipeline import NONE, TEXT, dense, do, load, params, record

pytestmark = [pytest.mark.numerics, pytest.mark.device]
OWN = {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8}
RECIPES = {
    "wanda": {"method": "wanda", "sparsity": 0.5, "calibration": TEXT},
    "owl": {
        "method": "magnitude", "sparsity": 0.5, "scope": "matrix", "allocation": {"kind": "owl"},
        "calibration": TEXT,
    },
    "own-words": {"method": "wanda", "sparsity": 0.5, "calibration": TEXT | OWN},
    "heads": {
        "method": "heads", "importance": "activation", "unit": "queries", "remove": 0.5, "calibration": TEXT,
    },
    "width": {"method": "width", "importance": "activation", "remove": 0.5, "calibration": TEXT},
    "resp": {"method": "resp", "sparsity": 0.5, "scope": "row", "steps": 1, "calibration": TEXT | OWN},
}  # fmt: skip


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """The output of every block for the calibration text, by hooks on transformers' own forward."""
    found = []
    windows = calibration_windows(families.tokenizer(), Windows(**TEXT), families.VOCAB)
    handles = [
        block.register_forward_hook(lambda _, __, out: found.append(out if torch.is_tensor(out) else out[0]))
        for _, block in blocks(model)
    ]
    forward(model, windows)
    for handle in handles:
        handle.remove()
    return [output.double() for output in found]


def errors(source: str, artifact: str, removed: tuple[int, ...] = ()) -> list[float]:
    before = [out for n, out in enumerate(outputs(dense(load(source)))) if n not in removed]
    after = outputs(dense(load(artifact)))
    return [
        float(((b - a).square().sum(-1).sqrt() / b.square().sum(-1).sqrt()).mean())
        for b, a in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_the_record_has_the_error_of_every_block(name, workspace):
    do(params("llama", {"prune/made": {"source": "base/tiny", **RECIPES[name]}}))
    note = record("prune/made")["notes"]["prune/made"]["block_errors"]
    assert note["tokens"] == 128
    assert note["errors"] == pytest.approx(errors("base/tiny", "prune/made"), rel=0.01)
    assert all(0 < error < 2 for error in note["errors"])


def test_a_quantized_and_a_shorter_model_are_compared_with_their_own_source(workspace):
    recipes = {
        "quantize/gptq": {
            "source": "base/tiny", "method": "gptq", "bits": 4, "group_size": 32, "calibration": TEXT,
        },
        "prune/shorter": {
            "source": "quantize/gptq", "method": "depth", "metric": "perplexity", "blocks": 1,
            "calibration": TEXT,
        },
        "quantize/rtn": {
            "source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE,
        },
    }  # fmt: skip
    do(params("qwen3", recipes), list(recipes))
    facts = record("prune/shorter")["notes"]
    first, second = (facts[name]["block_errors"]["errors"] for name in ("quantize/gptq", "prune/shorter"))
    assert first == pytest.approx(errors("base/tiny", "quantize/gptq"), rel=0.01)
    (gone,) = facts["prune/shorter"]["removed"]
    assert len(second) == 1
    assert second == pytest.approx(errors("quantize/gptq", "prune/shorter", (gone,)), rel=0.01, abs=1e-9)
    assert "block_errors" not in record("quantize/rtn")["notes"].get("quantize/rtn", {})


def test_a_token_counts_as_much_as_another_however_large():
    before = torch.tensor([[[1.0, 0.0], [0.0, 1000.0]]])
    after = torch.tensor([[[1.5, 0.0], [0.0, 1000.0]]])
    assert error_note([before], [after]) == {"block_errors": {"tokens": 2, "errors": [0.25]}}
    assert error_note([before], [after * torch.inf])["block_errors"]["errors"] == [None]


def test_no_more_than_512_tokens_are_compared():
    calibration = Calibration(dataset="none", num_samples=2, sequence_length=600, tokens="random", seed=0)
    sample = sample_windows(calibration, families.tokenizer(), families.VOCAB)
    assert sample.shape == (1, MOST_TOKENS)

"""Teaching as a stage: what it needs, and pruned models that learn from their dense parent."""

from typing import Any

import pandas as pd
import pytest
import torch

from stages.core.errors import Refusal
from stages.job import lineage
from tests import fewrows, lessons, pipeline
from tests.lessons import ANSWERS, LOGITS, SUMS, TWICE
from tests.pipeline import download, teach

pytestmark = [pytest.mark.usefixtures("workspace"), pytest.mark.device]


def tuned(dataset: str, packing: bool, **options: Any) -> dict[str, Any]:
    """Return a recipe that trains the pruned model on `dataset`."""
    train = {"dataset": dataset, "num_samples": 6, "held_out": 2, "sequence_length": 48, "packing": packing}
    return {
        "source": "prune/half", "method": "full", "keep": "mask", "train": train, "learning_rate": 0.01,
        "steps": 6, "batch_size": 2, **options,
    }  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_pruned_model_is_trained_on_answers_and_logits_of_its_dense_parent(packing):
    chosen = pipeline.params(
        "llama",
        {
            "prune/half": {
                "source": "base/tiny", "method": "magnitude", "sparsity": 0.5, "scope": "matrix",
                "calibration": {"dataset": "none"},
            },
            "teach/answered": ANSWERS,
            "teach/lesson": TWICE["lesson"],
            "finetune/imitates": tuned("answered", packing),
            "finetune/distilled": tuned("lesson", packing, distillation={"weight": 2.0, "temperature": 1.5}),
        },
        datasets={"sums": SUMS},
    )  # fmt: skip
    (missing,) = lineage.missing_inputs(chosen, [], ["lesson"])
    assert "data/datasets/lesson" in missing and "dvc repro teach@lesson" in missing
    download(chosen, "datasets/sums")
    pipeline.do(chosen)
    assert lineage.missing_inputs(chosen, [], ["lesson"]) == []
    texts = pipeline.record("finetune/distilled")["texts"]
    assert texts["lesson"] == "logits of base/tiny on sums (reasoning-gym)"
    zeros = {
        name: weight == 0
        for name, weight in pipeline.load("prune/half").named_parameters()
        if ".layers." in name and weight.ndim == 2
    }
    imitates, distilled = (
        dict(pipeline.load(f"finetune/{name}").named_parameters()) for name in ("imitates", "distilled")
    )
    for name, zero in zeros.items():
        assert (imitates[name][zero] == 0).all() and (distilled[name][zero] == 0).all(), name
    assert any(not torch.equal(imitates[name], distilled[name]) for name in zeros)
    held_out = pd.read_csv("data/curves/imitates.csv")["heldout_loss"].dropna()
    assert held_out.iloc[-1] < held_out.iloc[0] - 0.1


def test_a_teacher_with_fewer_rows_than_its_tokenizer_has_tokens_is_refused():
    chosen = fewrows.use(lessons.params(answered=ANSWERS, lesson=LOGITS))
    for name in ("datasets/news", "datasets/sums", "base/tiny"):
        download(chosen, name)
    for name in ("answered", "lesson"):
        with pytest.raises(Refusal, match=r"token .* has id .* embedding has 200 rows"):
            teach(chosen, name)

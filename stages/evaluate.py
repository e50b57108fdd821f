"""Evaluate: ask one candidate one suite, through lm-eval, and write its scores and its every answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stages.core.files import DATASET, DATASETS, RESULTS, read_json, writing
from stages.core.run import Run
from stages.evaluation.suite import Suite
from stages.job.entry import entry

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def evaluate(suite: Suite, settings: Run, name: str) -> None:
    """Evaluate `<candidate>/<suite>` into data/results/<candidate>/<suite>."""
    from stages.core import tables
    from stages.evaluation.kept import Finished
    from stages.evaluation.null import NullLM
    from stages.evaluation.shared import SharedPrefixLM
    from stages.model import artifact

    candidate, suite_name = name.rsplit("/", 1)
    device = settings.start()
    logging.getLogger("lm_eval.models.huggingface").addFilter(_is_news)
    record = artifact.load_record(candidate)
    batch_size = record.get("batch_size", suite.batch_size)
    run = settings.model_copy(update={"dtype": record.get("dtype", settings.dtype)})
    tokenizer = artifact.load_tokenizer(candidate)
    finished = Finished(candidate, suite_name, batch_size, run, suite)
    lm: LM
    if "responder" in record:
        lm = NullLM.named(record["responder"], tokenizer, run.seed)
    else:
        lm = SharedPrefixLM(
            finished=finished,
            pretrained=artifact.load_model(candidate, run, dequantize=False),
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=str(device),
            # lm-eval sums log-likelihoods in the model's dtype; bf16 would leave three digits of them.
            softmax_dtype="float32",
        )
    scores, samples = suite.evaluate(lm, suite_name, settings.seed)
    dataset = read_json(DATASETS / suite_name / DATASET)
    numerics = run.numerics()
    shared = {
        **tables.describe(record),
        "suite": suite_name,
        "dataset_source": dataset.get("source", "reasoning-gym"),
        "batch_size": batch_size,
        **{key: numerics[key] for key in ("dtype", "device", "threads")},
    }
    asked = {"candidate": candidate, "suite": suite_name}
    with writing(RESULTS / name) as folder:
        tables.write_tables(
            folder,
            tables.table([{**shared, **row} for row in scores], tables.SCORE_COLUMNS),
            tables.table([{**asked, **row} for row in samples], tables.SAMPLE_COLUMNS),
        )
    finished.forget()


def _is_news(record: logging.LogRecord) -> bool:
    """Drop lm-eval's warnings that the model was loaded already, which is how it is meant to be used here."""
    return not record.getMessage().startswith(("`pretrained` model kwarg", "Passed an already-initialized"))


if __name__ == "__main__":
    entry(evaluate)

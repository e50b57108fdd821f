"""Evaluate: score one candidate on one suite; write scores and answers beside its record.

For a base it also writes the questions, which whoever descends from it is asked too.
"""

from importlib.metadata import version
from typing import Any

from stages.core.backend import MISSING, Backend, installed
from stages.core.errors import Refusal
from stages.core.files import MODELS, RESULTS, read_json, source_of, writing
from stages.core.run import Run
from stages.core.tables import (
    ITEMS,
    TOKENS,
    Setting,
    item_table,
    sample_table,
    score_table,
    subject,
    token_table,
    write_tables,
)
from stages.evaluation.candidate import load_candidate
from stages.evaluation.kept import KeptAnswers
from stages.evaluation.room import VLLM_ROWS, usual_rows
from stages.evaluation.suite import Suite
from stages.job.entry import entry
from stages.model.artifact import load_record, write_record


def evaluate(suite: Suite, run: Run, name: str) -> None:
    """Evaluate `<candidate>/<suite>` into data/results/<candidate>/<suite>."""
    candidate, suite_name = name.rsplit("/", 1)
    run.start()
    record = load_record(candidate)
    backend = backend_of(record, suite, suite_name)
    engine = f"vllm {version('vllm')}" if backend == "vllm" else backend
    named = record.get("batch_size", suite.batch_size)
    batch_size = named or (VLLM_ROWS if backend == "vllm" else usual_rows(run.resolved_device()))
    adjusted = run.model_copy(update={"dtype": record.get("dtype", run.dtype)})
    kept = KeptAnswers(candidate, suite_name, batch_size, adjusted, type(suite).__module__, engine)
    lm = load_candidate(record, adjusted, batch_size, kept, fit=named is None, backend=backend)
    scores, samples = suite.evaluate(lm, suite_name, run.seed)
    config = MODELS / candidate / "config.json"
    about = subject(record, read_json(config) if config.exists() else None)
    arithmetic = adjusted.arithmetic()
    setting = Setting(
        suite=suite_name,
        dataset_source=source_of(suite_name),
        backend=None if "responder" in record else engine,
        batch_size=batch_size,
        **{key: arithmetic[key] for key in ("dtype", "device", "threads")},
    )
    with writing(RESULTS / name) as folder:
        write_record(folder, record)
        write_tables(
            folder,
            score_table(about, setting, scores),
            sample_table(candidate, suite_name, samples),
        )
        if len(tokens := token_table(candidate, suite_name, samples)):
            tokens.to_parquet(folder / TOKENS, index=False)
        if not about.source:  # whoever descends from a base is asked the same
            item_table(suite_name, samples).to_parquet(folder / ITEMS, index=False)
    kept.forget()


def backend_of(record: dict[str, Any], suite: Suite, name: str) -> Backend:
    """Return the engine that answers suite `name` for the candidate whose `artifact.json` is `record`.

    A noise candidate may name another than its source has. Where vLLM cannot answer a suite, the candidate
    keeps the suite's engine and differs from its source in the batch size or dtype that it must name as well.

    Raises:
        Refusal: vLLM is asked for and not installed, or cannot answer the suite.
    """
    if "responder" in record:
        return "transformers"
    backend: Backend = record.get("backend", suite.backend)
    if backend != "vllm":
        return backend
    if reason := suite.refuses_vllm():
        if suite.backend != "vllm" and record.keys() & {"batch_size", "dtype"}:
            return suite.backend
        raise Refusal(f"vLLM cannot answer suite {name}: {reason}; leave backend out.")
    if not installed():
        raise Refusal(f"{MISSING}.")
    return backend


if __name__ == "__main__":
    entry(evaluate)

"""Evaluate: score one candidate on one suite; write scores, answers, and for a base the questions."""

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
from stages.evaluation.room import usual_rows
from stages.evaluation.suite import Suite
from stages.job.entry import entry
from stages.model.artifact import load_record


def evaluate(suite: Suite, run: Run, name: str) -> None:
    """Evaluate `<candidate>/<suite>` into data/results/<candidate>/<suite>."""
    candidate, suite_name = name.rsplit("/", 1)
    run.start()
    record = load_record(candidate)
    named = record.get("batch_size", suite.batch_size)
    batch_size = named or usual_rows(run.resolved_device())
    adjusted = run.model_copy(update={"dtype": record.get("dtype", run.dtype)})
    kept = KeptAnswers(candidate, suite_name, batch_size, adjusted, type(suite).__module__)
    lm = load_candidate(record, adjusted, batch_size, kept, fit=named is None)
    scores, samples = suite.evaluate(lm, suite_name, run.seed)
    config = MODELS / candidate / "config.json"
    about = subject(record, read_json(config) if config.exists() else None)
    numerics = adjusted.numerics()
    setting = Setting(
        suite=suite_name,
        dataset_source=source_of(suite_name),
        batch_size=batch_size,
        **{key: numerics[key] for key in ("dtype", "device", "threads")},
    )
    with writing(RESULTS / name) as folder:
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


if __name__ == "__main__":
    entry(evaluate)

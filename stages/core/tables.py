"""The two tidy tables every evaluation writes: a row a score, a row an answered item.

A score row holds all that a fair comparison needs: which model and how large (`Subject`), evaluated under
which settings (`Setting`), and its score (`Score`). Each column holds a single fact, so no reader has to
parse text: `metric` is a name; its filter, its budget and the metric it counts have columns of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stages.core.lazy import pd

SCORES = "scores.parquet"
SAMPLES = "samples.parquet"
MEASURE = ("suite", "task", "readout", "metric", "counted", "filter", "budget")
"""Two scores of equal difficulty measure the same thing if they agree in these columns."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a candidate is."""

    candidate: str
    base: str
    """The name of the dense model it descends from; that model is the candidate `base/<base>`."""
    base_source: str
    base_grid: str | None = None
    """The number grid the base's weights already lie on, such as `Q4_1 g32`."""
    source: str | None = None
    """The artifact it was made from; None for a base."""
    lineage: list[str]
    """Its ancestors from the base on, and itself."""
    prune_method: str | None = None
    sparsity: float | None
    """None for a published checkpoint whose weights are only read packed."""
    structure: str
    quantize_method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    finetune_method: str | None = None
    calibration: str
    """What its recipes read, and whether after BOS, for people."""
    layout: str
    num_parameters: int
    bits_per_weight: float
    bytes_ideal: int
    bytes_on_disk: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings under which a suite scored a candidate."""

    suite: str
    dataset_source: str
    backend: str | None
    """`transformers`, or vLLM with its version, which no lock file pins; None for a responder."""
    batch_size: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score: a metric of a task, overall or at one level of difficulty."""

    task: str
    task_version: str
    template: str = "none"
    """The sha256 of the chat template around the prompts, or `none`."""
    shots: int
    penalties: str = "none"
    """What lowers the odds of repetition in generated text, beside the model."""
    cut_prompts: int | None = None
    """Prompts that lost their beginning, as the model reads fewer tokens; None where nothing may be cut."""
    bos: bool | None = None
    """Whether the model read BOS first; None for a responder without knowledge."""
    prompt_hash: str | None = None
    difficulty: str = "all"
    readout: str
    """`likelihood`, `generation` or `states`."""
    metric: str
    counted: str | None = None
    """The metric of one answer that a metric over draws counts; None for a metric that is not over draws."""
    filter: str | None = None
    """The task's filter of answers; None where it has one only."""
    budget: int | None = None
    """Most tokens of thinking; None where nothing is thought."""
    draws: int | None = None
    temperature: float | None = None
    value: float
    floor: float | None = None
    """The best score of a responder without knowledge; None where there is no such thing."""
    stderr: float | None = None
    num_items: int
    higher_is_better: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer, or one item's score."""

    task: str
    readout: str
    doc_id: int
    difficulty: str = "all"
    prompt_hash: str
    target: str | None = None
    response: str | None = None
    metric: str
    counted: str | None = None
    filter: str | None = None
    budget: int | None = None
    draw: int | None = None
    """The number of the draw that this answer is; None for an item's score."""
    score: float
    log_likelihoods: list[float] | None = None
    generated_tokens: int | None = None
    thinking: str | None = None


KINDS = {"str": "str", "float": "float64", "int": "Int64", "bool": "boolean"}


def _columns(*rows: type) -> dict[str, str]:
    """The columns of a table with the dtypes they are stored in, from the fields of its rows."""
    return {
        field.name: KINDS.get(str(field.type).removesuffix(" | None"), "object")
        for row in rows
        for field in fields(row)
    }


SCORE_COLUMNS = _columns(Subject, Setting, Score)
SAMPLE_COLUMNS = {"candidate": "str", "suite": "str", **_columns(Sample)}


def score_table(subject: Subject, setting: Setting, scores: Iterable[Score]) -> pd.DataFrame:
    """Join each score with its candidate and settings."""
    shared = asdict(subject) | asdict(setting)
    return table((shared | asdict(score) for score in scores), SCORE_COLUMNS)


def sample_table(candidate: str, suite: str, samples: Iterable[Sample]) -> pd.DataFrame:
    """Join each answer with its candidate and suite."""
    shared = {"candidate": candidate, "suite": suite}
    return table((shared | asdict(sample) for sample in samples), SAMPLE_COLUMNS)


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Make a frame with exactly `columns`, in order, missing where a row has no value.

    Raises:
        ValueError: a row has a column that the schema does not know.
    """
    rows = list(rows)
    if unknown := {key for row in rows for key in row} - columns.keys():
        raise ValueError(f"columns outside the schema: {', '.join(sorted(unknown))}")
    return pd.DataFrame(rows, columns=list(columns)).astype(dict(columns))


def subject(record: Mapping[str, Any]) -> Subject:
    """Say what a candidate is, from its `artifact.json`."""
    facts: dict[str, Any] = {"structure": "dense"}
    read: list[str] = []
    if record["layout"] != "dense" and not record["recipes"]:  # a published compressed checkpoint
        facts |= {key: record["base"]["grid"].get(key) for key in ("bits", "group_size")}
    for artifact in record["lineage"]:  # the last recipe of a stage names its method
        if artifact not in record["recipes"]:
            continue
        stage, recipe = artifact.split("/")[0], record["recipes"][artifact]
        facts[f"{stage}_method"] = recipe["method"]
        if stage == "prune":
            facts["structure"] = recipe.get("structure", "unstructured")
        grid = recipe if stage == "quantize" else recipe.get("grid")
        if grid and record["layout"] != "dense":  # later steps may have left the grid
            facts |= {"bits": grid["bits"], "group_size": grid["group_size"]}
        for text in recipe.values():
            if isinstance(text, dict) and "dataset" in text:
                after_bos = record.get("notes", {}).get(artifact, {}).get("bos", False)
                read += _read(stage, text, record["texts"], after_bos)
    lineage = list(record["lineage"])
    sizes = ("sparsity", "layout", "num_parameters", "bits_per_weight", "bytes_ideal", "bytes_on_disk")
    return Subject(
        candidate=record["artifact"],
        base=record["base"]["name"],
        base_source=record["base"]["source"],
        base_grid=_grid(record["base"]),
        source=lineage[-2] if len(lineage) > 1 else None,
        lineage=lineage,
        calibration="; ".join(read) or "none",
        **{key: record[key] for key in sizes},
        **facts,
    )


def _read(stage: str, text: Mapping[str, Any], sources: Mapping[str, str], after_bos: bool) -> list[str]:
    """Say what a recipe reads, for people."""
    name, end = text["dataset"], " after BOS" if after_bos else ""
    if "shots" in text:
        return [f"{stage}: {name} ({sources[name]}) graded items{end}"]
    if "num_samples" not in text:
        return []
    size = f"{text['num_samples']}x{text['sequence_length']}"
    kind = text.get("tokens", "text")
    if kind == "random":
        return [f"{stage}: random tokens {size}{end}"]
    if kind == "text" and text.get("seed") is not None:
        size += f" seed {text['seed']}"
    return [
        f"{stage}: {'generated from ' if kind == 'generated' else ''}{name} ({sources[name]}) {size}{end}"
    ]


def _grid(base: Mapping[str, Any]) -> str | None:
    grid = base.get("grid")
    if not grid:
        return None
    return str(grid["format"]) + (f" g{grid['group_size']}" if grid.get("group_size") else "")


def write_tables(folder: Path, scores: pd.DataFrame, samples: pd.DataFrame) -> None:
    """Write both tables into `folder`."""
    scores.to_parquet(folder / SCORES, index=False)
    samples.to_parquet(folder / SAMPLES, index=False)

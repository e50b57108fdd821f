"""The tidy tables of an evaluation: a row a score, a row an answered item, and for a base a row a question.

A score row holds all that a fair comparison needs: which model and how large (`Subject`), evaluated under
which settings (`Setting`), and its score (`Score`). Each column holds a single fact, so no reader has to
parse text: `metric` is a name; its filter, its budget and the metric it counts have columns of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.lazy import pd

SCORES = "scores.parquet"
SAMPLES = "samples.parquet"
ITEMS = "items.parquet"
ITEM = ("suite", "task", "readout", "doc_id", "prompt_hash")
"""The columns by which an answer is joined with its question."""
PROMPT_KEPT = 4000
"""Characters kept of a prompt, its last: the question stands behind the examples."""
TOKENS = "tokens.parquet"
_CHOICE_KEPT = 1000
"""Characters kept of a choice."""
PARAMETERS_REMOVED = "parameters_removed"
"""A column that the report adds: the share of its base's parameters that a candidate lacks."""
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
    allocation: str | None = None
    """How sparsity is spread over linears."""
    scope: str | None = None
    """The weights that a weight is compared with, where the method leaves a choice."""
    importance: str | None = None
    """How neurons or heads are chosen."""
    block_metric: str | None = None
    """How blocks are chosen."""
    blocks_removed: int = 0
    width_ratio: float | None = None
    """Neurons of an MLP for each unit of the hidden size; None where config.json does not say."""
    quantize_method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    finetune_method: str | None = None
    arm: str | None = None
    """Which weights a training froze, see `stages.recovery.keep`; None for a method without the choice."""
    steps: int = 0
    """Steps of all trainings behind it."""
    train_difficulty: str | None = None
    """The only level that the last training read; None if it read all."""
    recipe_seed: int | None = None
    """The last seed that a recipe of its lineage names, its own or its calibration's."""
    reads: list[str]
    """The data sets that its recipes read, each once, in the order of the lineage."""
    calibration: str
    """The same with sizes and sources, and whether after BOS, for people."""
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
    answer_when: str | None = None
    """When the answer is requested after thinking: `cut` or `always`; None where nothing is thought."""
    value: float
    floor: float | None = None
    """The best score of a responder without knowledge; None where there is no such thing."""
    stderr: float | None = None
    num_items: int
    higher_is_better: bool
    seed: int


class Likeliest(NamedTuple):
    """What a model predicts at every position of a window, as numpy arrays."""

    next: Any
    """int64 `[positions]`, the token that follows."""
    target: Any
    """fp32 `[positions]`, the logarithm of that token's probability."""
    ids: Any
    """int64 `[positions, top]`, the likeliest tokens, in descending order."""
    logs: Any
    """fp32 `[positions, top]`, the logarithms of their probabilities."""


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
    cut: bool | None = None
    """Whether a generated answer was still going on at its longest length."""
    thinking: str | None = None
    prompt: str = ""
    """The text that was asked; kept in the table of items, like `choices`."""
    choices: list[str] | None = None
    """The continuations that were compared, where there are some."""
    likeliest: Likeliest | None = None
    """The predictions behind it, where a suite keeps them; kept in the table of tokens."""


KINDS = {"str": "str", "float": "float64", "int": "Int64", "bool": "boolean"}


def _columns(*rows: type) -> dict[str, str]:
    """The columns of a table with the dtypes they are stored in, from the fields of its rows."""
    return {
        field.name: KINDS.get(str(field.type).removesuffix(" | None"), "object")
        for row in rows
        for field in fields(row)
    }


SCORE_COLUMNS = _columns(Subject, Setting, Score)
_APART = ("prompt", "choices", "likeliest")
"""Fields of a sample that stand in tables of their own."""
SAMPLE_COLUMNS = {
    "candidate": "str", "suite": "str",
    **{name: kind for name, kind in _columns(Sample).items() if name not in _APART},
}  # fmt: skip
ITEM_COLUMNS = {
    "suite": "str", "task": "str", "readout": "str", "doc_id": "Int64", "difficulty": "str",
    "prompt_hash": "str", "target": "str", "prompt": "str", "prompt_characters": "Int64", "choices": "object",
}  # fmt: skip


def score_table(subject: Subject, setting: Setting, scores: Iterable[Score]) -> pd.DataFrame:
    """Join each score with its candidate and settings."""
    shared = asdict(subject) | asdict(setting)
    return table((shared | asdict(score) for score in scores), SCORE_COLUMNS)


def sample_table(candidate: str, suite: str, samples: Iterable[Sample]) -> pd.DataFrame:
    """Join each answer with its candidate and suite."""
    shared = {"candidate": candidate, "suite": suite}
    rows = (shared | vars(sample) for sample in samples)
    return table(({key: row[key] for key in SAMPLE_COLUMNS} for row in rows), SAMPLE_COLUMNS)


def token_table(candidate: str, suite: str, samples: Iterable[Sample]) -> pd.DataFrame:
    """Return the predictions behind windows, a row a window, `ids` and `logs` as flat lists."""
    rows = [
        {
            "candidate": candidate, "suite": suite, "prompt_hash": sample.prompt_hash,
            "next": kept.next.astype("int32"), "target": kept.target,
            "ids": kept.ids.astype("int32").ravel(), "logs": kept.logs.ravel(),
        }
        for sample in samples
        if (kept := sample.likeliest) is not None
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["candidate", "suite", "prompt_hash", *Likeliest._fields])


def item_table(suite: str, samples: Iterable[Sample]) -> pd.DataFrame:
    """Return the questions behind answers, each once, with at most `PROMPT_KEPT` characters of a prompt."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for sample in samples:
        row = {"suite": suite, **{key: value for key, value in vars(sample).items() if key in ITEM_COLUMNS}}
        key = tuple(row[name] for name in ITEM)
        if key not in rows:
            choices = sample.choices and [choice[-_CHOICE_KEPT:] for choice in sample.choices]
            kept = {"prompt": sample.prompt[-PROMPT_KEPT:], "prompt_characters": len(sample.prompt)}
            rows[key] = row | kept | {"choices": choices}
    return table(rows.values(), ITEM_COLUMNS)


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Make a frame with exactly `columns`, in order, missing where a row has no value.

    Raises:
        ValueError: a row has a column that the schema does not know.
    """
    rows = list(rows)
    if unknown := {key for row in rows for key in row} - columns.keys():
        raise ValueError(f"columns outside the schema: {', '.join(sorted(unknown))}")
    return pd.DataFrame(rows, columns=list(columns)).astype(dict(columns))


def subject(record: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Subject:
    """Say what a candidate is.

    Args:
        record: its `artifact.json`.
        config: its `config.json`, which has its widths; None for a responder without a model.
    """
    facts: dict[str, Any] = {"structure": "dense", "blocks_removed": 0, "steps": 0}
    names: dict[str, None] = {}
    read: list[str] = []
    if record["layout"] != "dense" and not record["recipes"]:  # a published compressed checkpoint
        facts |= {key: record["base"]["grid"].get(key) for key in ("bits", "group_size")}
    for artifact in record["lineage"]:  # the last recipe of a stage names its method
        if artifact not in record["recipes"]:
            continue
        stage, recipe = artifact.split("/")[0], record["recipes"][artifact]
        notes = record.get("notes", {}).get(artifact, {})
        facts[f"{stage}_method"] = recipe["method"]
        facts |= _choices(stage, recipe)
        if stage == "prune":
            facts["structure"] = recipe.get("structure", "unstructured")
            if recipe.get("target") == "block":
                facts["blocks_removed"] += len(notes["removed"])
        if stage == "finetune":
            facts["steps"] += notes.get("steps") or recipe.get("steps") or 0
        grid = recipe if stage == "quantize" else recipe.get("grid")
        if grid and record["layout"] != "dense":  # later steps may have left the grid
            facts |= {"bits": grid["bits"], "group_size": grid["group_size"]}
        for text in recipe.values():
            if isinstance(text, dict) and "dataset" in text:
                read += _read(stage, text, record["texts"], notes.get("bos", False))
                if text["dataset"] != "none" and text.get("tokens") != "random":
                    names[text["dataset"]] = None
    lineage = list(record["lineage"])
    sizes = ("sparsity", "layout", "num_parameters", "bits_per_weight", "bytes_ideal", "bytes_on_disk")
    return Subject(
        candidate=record["artifact"],
        base=record["base"]["name"],
        base_source=record["base"]["source"],
        base_grid=_grid(record["base"]),
        source=lineage[-2] if len(lineage) > 1 else None,
        lineage=lineage,
        width_ratio=_width_ratio(config or {}),
        reads=list(names),
        calibration="; ".join(read) or "none",
        **{key: record[key] for key in sizes},
        **facts,
    )


def _choices(stage: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of choices that a recipe makes; those that it leaves open are not among them."""
    calibration = recipe.get("calibration")
    seeds = [recipe.get("seed"), calibration.get("seed") if isinstance(calibration, dict) else None]
    chosen: dict[str, Any] = {"recipe_seed": next((seed for seed in seeds if seed is not None), None)}
    if stage == "prune":
        allocation = recipe.get("allocation")
        chosen |= {"allocation": allocation["kind"]} if isinstance(allocation, dict) else {}
        chosen |= {name: recipe.get(name) for name in ("scope", "importance")}
        chosen["block_metric"] = recipe.get("metric")
    known = {name: value for name, value in chosen.items() if value is not None}
    if stage == "finetune":  # the last training says so, even if it has no such choice
        known |= {"arm": recipe.get("keep"), "train_difficulty": recipe["train"].get("difficulty")}
    return known


def _width_ratio(config: Mapping[str, Any]) -> float | None:
    text = config.get("text_config") or config
    widths = (text.get("intermediate_size", text.get("ffn_dim")), text.get("hidden_size"))
    width, hidden = (size if isinstance(size, int) else None for size in widths)  # a list: blocks differ
    return width / hidden if width and hidden else None


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

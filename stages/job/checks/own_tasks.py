"""Tasks of lm-eval: whether the names that suites and YAML files use exist, before anything is downloaded.

Importing lm-eval and indexing its tasks takes ten seconds, so names are read off its files: those of metrics
off its decorators, those of tasks off its YAML. A task is looked for in files of its name first.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.core.errors import Refusal
from stages.corpus.examples import Selection
from stages.evaluation.stock import OURS
from stages.job.params import Params
from stages.job.sentences import allowed
from stages.sources.task import Function, OwnTask, data_files, metrics, read_task

_METRIC = re.compile(r'register_metric\(\s*metric="([^"]+)"')
_TASK = re.compile(
    r"""^[\s-]*["']?(?:task|group|tag)["']?:\s*["']?([^"'#:\n]+?)["']?\s*(?:#.*)?$""", re.MULTILINE
)
_LISTED = re.compile(r"""^\s*-\s*["']?([^"'#:\n]+?)["']?\s*(?:#.*)?$""", re.MULTILINE)
"""A name in a YAML list, as a task's tags can be."""
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
"""Fields of a task that are templates over the columns of its data."""


def of_tasks(params: Params) -> Iterator[str]:
    """Yield own tasks whose YAML, data or metrics are wrong, and names that are no task of lm-eval."""
    for name, dataset in params.datasets.items():
        if isinstance(dataset, OwnTask) and dataset.source.startswith("path:"):
            learned = {
                text.split
                for recipe in params.recipes().values()
                for text in recipe.reads().values()
                if isinstance(text, Selection) and text.dataset == name
            }
            yield from _of_own(f"datasets.{name}", dataset, learned)
    for name, suite in params.suites.benchmark.items():
        if not suite.own and not _is_task(suite.task):
            close = difflib.get_close_matches(suite.task, sorted(_tasks()), 3)
            meant = f"did you mean {', '.join(close)}? " if close else ""
            yield (
                f"suites.benchmark.{name}.task: lm-eval has no task {suite.task!r}; {meant}`lm-eval ls "
                "tasks` lists its tasks, and path:<file> names your own."
            )


def _of_own(at: str, dataset: OwnTask, learned: set[str | None]) -> Iterator[str]:
    """Yield the mistakes of a task; `learned` are the splits that recipes train on."""
    root = Path(dataset.source.removeprefix("path:"))
    if not root.is_dir():
        yield f"{at}.source: {dataset.source} is a file; name the folder that holds the YAML and its data."
        return
    try:
        config = read_task(root, dataset.yaml)
        splits = data_files(config, root, dataset.yaml)
    except Refusal as refusal:
        yield f"{at}: {refusal}"
        return
    kind = config.get("output_type", "generate_until")
    if kind not in (kinds := _output_types()):
        yield f"{at}: {dataset.yaml} has output_type {kind!r}; {allowed(kinds, str(kind))}."
    yield from _of_templates(at, dataset.yaml, config, splits)
    yield from _of_answers(at, dataset.yaml, config, splits)
    for metric in metrics(config):
        if metric not in (known := _metrics()):
            close = difflib.get_close_matches(metric, known, 1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            yield (f"{at}: {dataset.yaml} names the metric {metric!r}; {meant}allowed: {', '.join(known)}.")
    scored = config.get("test_split") or config.get("validation_split")
    if scored not in splits:
        yield (
            f"{at}: {dataset.yaml} is scored on {scored}, but its data_files have {', '.join(splits)}; set "
            "test_split to one of these."
        )
    elif scored in learned:
        yield (
            f"{at}: a recipe trains on {scored}, the split that {dataset.yaml} is scored on; train on "
            "another split, or set test_split to another."
        )


def _of_templates(
    at: str, file: str, config: Mapping[str, Any], splits: Mapping[str, list[Path]]
) -> Iterator[str]:
    """Yield templates that are broken, or name a column that no row of the data has."""
    from jinja2 import Environment, TemplateSyntaxError, meta
    from jinja2.defaults import DEFAULT_NAMESPACE

    if isinstance(config.get("process_docs"), Function):  # its code may add columns
        return
    columns = {name for files in splits.values() for data in files for name in _columns(data)}
    for field in _TEMPLATES:
        template = config.get(field)
        if not isinstance(template, str):
            continue
        if not re.search(r"{[{%]", template):  # a column, or else the same text for every item
            if columns and template not in columns and template.isidentifier():
                known = ", ".join(sorted(columns))
                yield f"{at}: {field} of {file} is {template!r}, no column; its data have {known}."
            continue
        try:
            named = meta.find_undeclared_variables(Environment().parse(template))
        except TemplateSyntaxError as error:
            yield f"{at}: {field} of {file} is no template ({error.message}); correct it."
            continue
        if columns and (lost := sorted(named - columns - DEFAULT_NAMESPACE.keys())):
            known = ", ".join(sorted(columns))
            yield f"{at}: {field} of {file} names {' and '.join(lost)}; the columns of its data are {known}."


def _of_answers(
    at: str, file: str, config: Mapping[str, Any], splits: Mapping[str, list[Path]]
) -> Iterator[str]:
    """Yield the first item of a split that is answered by choice and whose answer is no choice.

    lm-eval counts such an item as wrong, whatever the model says.
    """
    target, choice = config.get("doc_to_target"), config.get("doc_to_choice")
    if config.get("output_type") != "multiple_choice" or isinstance(config.get("process_docs"), Function):
        return
    for data in (data for files in splits.values() for data in files):
        for place, row in enumerate(_rows(data), 1):
            answer = row.get(target) if isinstance(target, str) else target
            choices = row.get(choice) if isinstance(choice, str) else choice
            if answer is None or not isinstance(choices, list):
                continue
            answers = answer if isinstance(answer, list) else [answer]  # several may be right
            if any("{" in str(option) for option in choices):  # lm-eval alone fills these templates in
                answers = [one for one in answers if isinstance(one, int)]
            if not all(one in (range(len(choices)) if isinstance(one, int) else choices) for one in answers):
                shown = ", ".join(map(repr, choices))
                yield (
                    f"{at}: item {place} of {data.name} has the answer {answer!r} in {target}, but its "
                    f"choices are {shown}; {file} needs one of them, or its place counted from 0."
                )
                break


def _columns(data: Path) -> list[str]:
    """Return the columns of a data file; none if it cannot be told, which the download says."""
    import pandas as pd
    import pyarrow.parquet as pq

    with suppress(Exception):
        if data.suffix == ".parquet":
            return list(pq.read_schema(data).names)
        if data.suffix == ".csv":
            return list(pd.read_csv(data, nrows=0).columns)
    return list(dict.fromkeys(name for row in _rows(data) for name in row))


def _rows(data: Path) -> list[dict[str, Any]]:
    """Return the items of a data file; none if it cannot be read, which the download says."""
    import pandas as pd
    import pyarrow.parquet as pq

    with suppress(Exception):
        if data.suffix == ".parquet":
            return list(pq.read_table(data).to_pylist())
        if data.suffix == ".csv":
            rows = pd.read_csv(data).astype(object).to_dict("records")
            return [{str(name): value for name, value in row.items()} for row in rows]
        text = data.read_text(encoding="utf-8")
        items = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
        return [dict(item) for item in items]
    return []


def _lm_eval() -> Path:
    """Return lm-eval's folder, without importing it."""
    spec = find_spec("lm_eval")
    assert spec and spec.origin
    return Path(spec.origin).parent


@cache
def _output_types() -> list[str]:
    """Return the values of `output_type`."""
    code = (_lm_eval() / "api" / "task.py").read_text(encoding="utf-8")
    listed = re.search(r"ALL_OUTPUT_TYPES = \[(.*?)\]", code, re.DOTALL)
    assert listed, "lm-eval lists its output types elsewhere"
    return re.findall(r'"(\w+)"', listed[1])


@cache
def _metrics() -> list[str]:
    """Return the metrics that lm-eval knows by name."""
    return sorted(set(_METRIC.findall((_lm_eval() / "api" / "metrics.py").read_text(encoding="utf-8"))))


def _is_task(name: str) -> bool:
    """Tell whether lm-eval or the project has a task, group or tag of this name."""
    files = [OURS / f"{name}.yaml", *(_lm_eval() / "tasks").rglob(f"*{name}*.yaml")]
    return any(name in _names(file) for file in files if file.exists()) or name in _tasks()


@cache
def _tasks() -> frozenset[str]:
    """Return every name that may be one of a task, group or tag."""
    # A tag may stand in an included file, whose name has no suffix.
    inside = [file for file in (_lm_eval() / "tasks").rglob("*") if file.suffix in ("", ".yaml")]
    files = [*filter(Path.is_file, inside), *OURS.glob("*.yaml")]
    return frozenset(name for file in files for name in _names(file))


def _names(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    return _TASK.findall(text) + _LISTED.findall(text)

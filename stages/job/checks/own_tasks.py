"""Tasks of lm-eval: whether the names that suites and YAML files use exist, before anything is downloaded.

Importing lm-eval and indexing its tasks takes ten seconds, so names are read off its files: those of metrics
off its decorators, those of tasks off its YAML. A task is looked for in files of its name first.
"""

import difflib
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from stages.core.errors import Refusal
from stages.corpus.examples import Selection
from stages.evaluation.stock import OURS
from stages.job.params import Params
from stages.sources.task import OwnTask, data_files, metrics, read_task

_METRIC = re.compile(r'register_metric\(\s*metric="([^"]+)"')
_TASK = re.compile(
    r"""^[\s-]*["']?(?:task|group|tag)["']?:\s*["']?([^"'#:\n]+?)["']?\s*(?:#.*)?$""", re.MULTILINE
)
_LISTED = re.compile(r"""^\s*-\s*["']?([^"'#:\n]+?)["']?\s*(?:#.*)?$""", re.MULTILINE)
"""A name in a YAML list, as a task's tags can be."""


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


def _lm_eval() -> Path:
    """Return lm-eval's folder, without importing it."""
    spec = find_spec("lm_eval")
    assert spec and spec.origin
    return Path(spec.origin).parent


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

"""Data that suites score: it must exist, be of the right kind, and not be what recipes learn from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.core.backend import MISSING, installed
from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.core.schema import Strict
from stages.corpus.examples import Selection
from stages.corpus.taught import downloaded
from stages.evaluation.graded import GradedSuite
from stages.evaluation.stock import BenchmarkSuite
from stages.evaluation.suite import Suite
from stages.job.checks.learning import too_many_shots
from stages.job.params import SUITES, Params
from stages.job.sentences import allowed, tag
from stages.sources.documents import Documents
from stages.sources.graded.items import STEPS, GradedData, Level
from stages.sources.mix import Mix
from stages.sources.task import OwnTask
from stages.sources.text import Text

SCORED = ("test", "validation")
"""The splits that lm-eval's tasks score."""


@dataclass
class _Learned:
    """What recipes learn from, by what would make a suite score the same."""

    texts: dict[str, str] = field(default_factory=dict)
    """sha256 of a text -> its data set."""
    parts: dict[str, tuple[str, Documents]] = field(default_factory=dict)
    """sha256 of a text in a mix -> the data set of the mix, and the part."""
    levels: list[tuple[Level, str]] = field(default_factory=list)
    """The `domain` of each level of graded items, and its data set."""
    splits: dict[str, str] = field(default_factory=dict)
    """A benchmark -> its split, where lm-eval scores it."""


def of_suites(params: Params, broken: set[str]) -> Iterator[str]:
    """Yield the mistakes of every suite, at most one a suite.

    Args:
        broken: data sets with mistakes of their own.
    """
    yield from _of_names(params)
    learned = _learned(params)
    seen: set[str] = set()
    for kind, suites in params.suites.by_kind().items():
        candidates = dict.fromkeys(params.evaluate.candidates)
        stages = [f"{candidate}-{name}" for candidate in candidates for name in suites]
        for stage in sorted({stage for stage in stages if stages.count(stage) > 1}):
            yield f"suites.{kind}: two evaluations would both be stage {kind}@{stage}; rename a suite."
        for name, suite in suites.items():
            at = f"suites.{kind}.{name}"
            if name in seen:
                yield f"{at}: a suite of another kind has this name; rename one."
            seen.add(name)
            if params.suites.dataset_of(name) not in broken and (
                mistake := _mistake(name, suite, SUITES[kind].scores, params, learned)
            ):
                yield f"{at}{mistake}"


def _of_names(params: Params) -> Iterator[str]:
    """Yield entries of suites.datasets that name no suite, or take the name of a data set."""
    suites = params.suites.by_name()
    for name in params.suites.datasets:
        at = f"suites.datasets.{name}"
        if name not in suites:
            yield f"{at}: there is no suite {name!r}; {allowed(suites, name)}."
        elif name in (*params.datasets, *params.teach, "none"):
            yield f"{at}: {name} is a data set itself; rename the suite."


def _learned(params: Params) -> _Learned:
    learned = _Learned()
    for recipe in params.recipes().values():
        for text in recipe.reads().values():
            name = downloaded(params.teach, text.dataset)
            dataset = params.datasets.get(name)
            if isinstance(dataset, Text):
                learned.texts[dataset.sha256] = name
            elif isinstance(dataset, Mix):
                learned.parts |= {part.sha256: (name, part) for part in dataset.parts.values()}
            elif isinstance(dataset, GradedData):
                learned.levels += [(level.domain(), name) for level in dataset.levels]
            elif isinstance(text, Selection) and text.split in SCORED:
                learned.splits[name] = text.split
    return learned


def _mistake(name: str, suite: Suite, scores: type[Strict], params: Params, learned: _Learned) -> str:
    """Say what is wrong with a suite, starting after its name in params; empty if nothing is.

    Args:
        scores: the kind of data set that a suite of this kind scores.
    """
    if mistake := _of_backend(suite):
        return mistake
    scored = params.suites.dataset_of(name)
    dataset = params.datasets.get(scored)
    if isinstance(suite, BenchmarkSuite) and (suite.own or isinstance(dataset, OwnTask)):
        if mistake := _of_own_task(scored, suite, dataset):
            return mistake
    elif not isinstance(dataset, scores):
        fitting = [key for key, other in params.datasets.items() if isinstance(other, scores)]
        kind = "a graded kind" if scores is GradedData else f"kind {tag(scores)}"
        return (
            f": it scores datasets.{scored}, and there is none of {kind}; name its data set in "
            f"suites.datasets; {allowed(fitting, scored)}."
        )
    if scored in learned.splits:
        return (
            f": recipes learn from split {learned.splits[scored]} of datasets.{scored}, which it may score; "
            "let them learn from another split, such as train."
        )
    if isinstance(dataset, Text) and (other := learned.texts.get(dataset.sha256, scored)) != scored:
        return (
            f": it would score the very file that recipes learn from as datasets.{other}; let it score "
            f"{other}, whose two splits are kept apart."
        )
    if isinstance(dataset, Text) and dataset.sha256 in learned.parts:
        mix, part = learned.parts[dataset.sha256]
        fields = ("documents", "column", "calibration")
        if unlike := [key for key in fields if getattr(part, key) != getattr(dataset, key)]:
            return (
                f": recipes learn from its file as a part of datasets.{mix} with another "
                f"{', '.join(unlike)}, so they may learn from what it scores; give both the same."
            )
    if isinstance(dataset, GradedData):
        levels = [level.domain() for level in dataset.levels]
        if shared := sorted(other for level, other in learned.levels if other != scored and level in levels):
            return (
                f": it would score items that recipes learn from as datasets.{shared[0]}, with which it "
                f"shares levels; let it score {shared[0]}, whose splits are kept apart."
            )
        if isinstance(suite, GradedSuite):
            if suite.chain_of_thought and STEPS not in dataset.columns:
                kinds = [tag(kind) for kind in GradedData.__subclasses__() if STEPS in kind.columns]
                return (
                    f".chain_of_thought: datasets.{scored} is of kind {tag(type(dataset))}, whose items "
                    f"have no steps to show; {allowed(kinds)}."
                )
            return too_many_shots("", scored, suite.shots, dataset) or ""
    return ""


def _of_own_task(name: str, suite: BenchmarkSuite, dataset: Any) -> str:
    """Say that a suite's own task and the data set of its name are not the same YAML."""
    if isinstance(dataset, OwnTask):
        if suite.task == dataset.name:
            return ""
        return (
            f".task: {suite.task!r} given, but datasets.{name} is {dataset.name}; write task: {dataset.name}."
        )
    source, _, file = suite.task.rpartition("/")
    folder = Path(source.removeprefix("path:"))
    if not source or not (folder / file).is_file():
        return (
            f".task: {suite.task} is no YAML file in a folder; name one that lies with its data in a folder "
            "of its own, such as path:my_tasks/qa.yaml."
        )
    return (
        f".task: {suite.task} needs a data set of the suite's name that hashes its folder; write datasets: "
        f"{{{name}: {{kind: task, source: {source}, yaml: {file}, sha256: {sha256(folder)}}}}}."
    )


def _of_backend(suite: Suite) -> str:
    """Say why vLLM cannot answer a suite that asks for it, in the form of `_mistake`."""
    if suite.backend != "vllm":
        return ""
    try:
        reason = suite.refuses_vllm()
    except Refusal as refusal:  # lm-eval has no such task
        return f": {refusal}"
    if reason:
        return f".backend: vLLM cannot answer this suite: {reason}; leave backend out."
    return "" if installed() else f".backend: {MISSING}."

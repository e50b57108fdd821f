"""What suites score: data that is not there or of another kind, and data that recipes learn from."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages.core.schema import Strict
from stages.corpus.examples import Chosen
from stages.evaluation.graded import GradedSuite
from stages.job.lineage import downloaded
from stages.job.params import SUITES
from stages.job.sentences import allowed, tag
from stages.sources.graded.items import Graded, Level
from stages.sources.text import Text

if TYPE_CHECKING:
    from stages.job.params import Params

SCORED = ("test", "validation")
"""Splits that lm-eval's tasks score."""


def of_suites(params: "Params", broken: set[str]) -> Iterator[str]:
    seen: set[str] = set()
    learned: dict[str, str] = {}
    drilled: list[tuple[Level, str]] = []
    rehearsed: dict[str, str] = {}
    for recipe in params.recipes().values():
        for wanted in recipe.reads().values():
            origin = downloaded(params, wanted.dataset)
            dataset = params.datasets.get(origin)
            if isinstance(dataset, Text):
                learned[dataset.sha256] = origin
            elif isinstance(dataset, Graded):
                drilled += [(_unnamed(level), origin) for level in dataset.levels]
            elif isinstance(wanted, Chosen) and wanted.split in SCORED:
                rehearsed[origin] = wanted.split
    for kind, suites in params.suites.by_kind().items():
        config = SUITES[kind].scores
        candidates = dict.fromkeys(params.evaluate.candidates)
        stages = [f"{candidate}-{name}" for candidate in candidates for name in suites]
        for stage in sorted({stage for stage in stages if stages.count(stage) > 1}):
            yield f"suites.{kind}: two evaluations would both be the stage {kind}@{stage}; rename a suite."
        for name, suite in suites.items():
            at, dataset = f"suites.{kind}.{name}", params.datasets.get(name)
            if name in seen:
                yield f"{at}: the name is taken by a suite of another kind; rename one."
            seen.add(name)
            if name in broken:
                continue
            if not isinstance(dataset, config):
                fitting = [key for key, found in params.datasets.items() if isinstance(found, config)]
                yield (
                    f"{at}: a suite scores the data set of its own name, and datasets has no {name!r} of "
                    f"{_kind(config)}; {allowed(fitting, name)}."
                )
            elif name in rehearsed:
                yield (
                    f"{at}: recipes learn from split {rehearsed[name]} of datasets.{name}, which it may "
                    "score; let them learn from another split, such as train."
                )
            elif isinstance(dataset, Text) and learned.get(dataset.sha256, name) != name:
                yield (
                    f"{at}: it would score the very file that recipes learn from as "
                    f"datasets.{learned[dataset.sha256]}; name that suite {learned[dataset.sha256]}, whose "
                    "two splits are kept apart."
                )
            elif isinstance(dataset, Graded) and (
                others := {
                    other
                    for level, other in drilled
                    if other != name and level in map(_unnamed, dataset.levels)
                }
            ):
                yield (
                    f"{at}: it would score items that recipes learn from as datasets.{min(others)}, for they "
                    f"have levels in common; name that suite {min(others)}, whose splits are kept apart."
                )
            elif (
                isinstance(suite, GradedSuite)
                and isinstance(dataset, Graded)
                and suite.shots > dataset.num_examples
            ):
                yield f"{at}.shots: {suite.shots} given; datasets.{name} has {dataset.num_examples} examples."


def _kind(config: type[Strict]) -> str:
    return "a graded kind" if config is Graded else f"kind {tag(config)}"


def _unnamed(level: Level) -> Level:
    """What decides on a level's items."""
    return level.model_copy(update={"name": "any"})

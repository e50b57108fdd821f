"""The scope of a report: which results it compares, and the recipes behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.corpus.taught import downloaded
from stages.reporting.judging import Report
from stages.reporting.study import Study


@dataclass(frozen=True)
class Scope:
    """The results that must exist, and the origin of their candidates.

    It comes from params.yaml and never from the files in `data/results`: a recipe that is removed from
    params.yaml leaves its results behind, and they are no part of the comparison.
    """

    evaluations: tuple[str, ...]
    """`<candidate>/<suite>`."""
    candidates: tuple[str, ...]
    """In the order of the tables."""
    suites: tuple[str, ...]
    """In the order of the tables, within a candidate."""
    datasets: Mapping[str, str]
    """The data set of each suite that scores another than that of its name."""
    profiled: tuple[str, ...]
    """The candidates whose speed and memory are measured."""
    models: Mapping[str, Any]
    """The settings of each base model, by name."""
    recipes: Mapping[str, Any]
    """The settings of each recipe, by `<stage>/<recipe>`."""
    report: Report
    """What counts as the same, and whom candidates are compared with."""
    studies: Mapping[str, Study]
    """The hypotheses to judge, by study."""
    mixed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The data sets whose file is a part of a mix, by the mix."""

    def has_read(self, candidate: str, suite: str) -> bool:
        """Tell whether a candidate learned from the data set that a suite scores, from another part of it."""
        return self.datasets.get(suite, suite) in self.learned_from(candidate)

    def learned_from(self, candidate: str) -> list[str]:
        """Return every data set that a candidate's lineage learned from, with the sources of taught ones
        and the parts of mixes."""
        taught = {
            name.removeprefix("teach/"): self.recipes[name] for name in self.recipes if "teach/" in name
        }
        names: list[str] = []
        artifact = candidate
        while recipe := self.recipes.get(artifact):
            for text in recipe.reads().values():
                read = downloaded(taught, text.dataset)
                names += [text.dataset, read, *self.mixed.get(read, ())]
            artifact = recipe.source
        return list(dict.fromkeys(names))

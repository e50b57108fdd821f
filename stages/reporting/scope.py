"""What a report compares, as params name it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scope:
    """The results there must be, and where their candidates come from.

    They are read from params and never from what lies in `data/results`: a recipe taken out of params leaves its
    results behind, and these are not part of the comparison.
    """

    evaluations: tuple[str, ...]
    """`<candidate>/<suite>`."""
    candidates: tuple[str, ...]
    """In the order of the tables."""
    suites: tuple[str, ...]
    """In the order of the tables, within a candidate."""
    models: Mapping[str, Any]
    """The settings of each base model, by name."""
    recipes: Mapping[str, Any]
    """The settings of each recipe, by `<stage>/<recipe>`."""
    learned_from: Mapping[str, list[str]]
    """The data sets that each candidate's lineage learned from."""

"""Results of single items for hypotheses, and hypotheses judged on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from stages.job.load import _tuples
from stages.reporting.collect import Results
from stages.reporting.hypotheses.cells import Cells
from stages.reporting.hypotheses.evidence import Evidence
from stages.reporting.hypotheses.tested import Tested
from stages.reporting.study import Hypothesis, Study
from tests.results import of_items, together

ACC = {"suite": "s", "metric": "acc"}
Scores = Mapping[str, Sequence[float]]


def leveled(levels: Mapping[str, Scores], floor: float | None = 0.0, **measure: Any) -> Results:
    """Return results by level, each of items of its own, and over all levels.

    Args:
        levels: the scores of each candidate, by level.
    """
    parts: list[Results] = []
    start = 0
    for level, items in levels.items():
        part = of_items(dict(items), difficulty=level, **measure)
        numbers = part.samples["doc_id"] + start
        start += len(next(iter(items.values())))
        parts.append(
            Results(part.scores, part.samples.assign(doc_id=numbers, prompt_hash=numbers.astype(str)))
        )
    every = {
        name: [x for items in levels.values() for x in items[name]] for name in next(iter(levels.values()))
    }
    whole = of_items(every, **measure).scores
    scores = pd.concat([whole, *(part.scores for part in parts)], ignore_index=True)
    return Results(scores.assign(floor=floor), together(*parts).samples)


def hypothesis(**settings: Any) -> Tested:
    """Return a hypothesis from settings as in params.yaml."""
    tested: Tested = TypeAdapter(Hypothesis).validate_python(_tuples({"claim": "c"} | settings))
    return tested


def judged(results: Results, noise: Mapping[str, tuple[str, ...]] | None = None, **settings: Any) -> Evidence:
    """Judge a hypothesis given as settings; `noise` names repeats as in `report.noise`."""
    return hypothesis(**settings).judge(Cells(results, noise))


def study(**hypotheses: dict[str, Any]) -> Study:
    """Return a study of hypotheses given as settings."""
    named = {name: {"claim": "c"} | settings for name, settings in hypotheses.items()}
    return Study.model_validate(
        _tuples({"claim": "c", "source": "s", "profile": "laptop", "hypotheses": named})
    )


def difference(ours: str, base: str = "base/m", *readouts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return a contrast of two candidates."""
    sides = [{"weight": 1.0, "candidate": ours}, {"weight": -1.0, "candidate": base}]
    chosen = list(readouts) or [ACC]
    return {"test": "contrast", "sides": sides, "readouts": chosen, "expect": "below"} | settings

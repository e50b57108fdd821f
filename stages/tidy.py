"""Tidy: move results and profiles that params.yaml no longer names out of data/, just before the report.

The report depends on the whole folders `data/results` and `data/profile`, so a result left over from a recipe
that was removed would count as its input. What is moved stays in `data/removed`, and in DVC's cache.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from stages.core.files import PROFILES, REMOVED, RESULTS, TIDIED, write_json
from stages.core.tables import SCORES
from stages.job.entry import entry


def tidy(evaluations: Sequence[str], profiled: Sequence[str]) -> None:
    """Move all but what params.yaml names, and write the constant mark of that.

    Args:
        evaluations: `<candidate>/<suite>`.
        profiled: candidates.
    """
    for scores in sorted(RESULTS.glob(f"*/*/*/{SCORES}")):
        _keep(scores.parent, scores.parent.relative_to(RESULTS), evaluations, REMOVED)
    for facts in sorted(PROFILES.glob("*/*/profile.json")):
        _keep(facts.parent, facts.parent.relative_to(PROFILES), profiled, REMOVED / PROFILES.name)
    write_json(TIDIED, {"data/results": "tidy", "data/profile": "tidy"})


def _keep(folder: Path, name: Path, named: Sequence[str], removed: Path) -> None:
    """Move a folder to `removed`, unless it is among those named."""
    if name.as_posix() not in named:
        shutil.rmtree(removed / name, ignore_errors=True)
        (removed / name).parent.mkdir(parents=True, exist_ok=True)
        folder.replace(removed / name)


if __name__ == "__main__":
    entry(tidy)

"""Tidy: move results that params.yaml no longer names out of data/results, just before the report.

The report depends on the whole folder of results, so one left over from a recipe that was removed would count
as its input. Moved results stay in `data/removed`, and in DVC's cache.
"""

import shutil
from collections.abc import Sequence

from stages.core.files import REMOVED, RESULTS, TIDIED, write_json
from stages.core.tables import SCORES
from stages.job.entry import entry


def tidy(evaluations: Sequence[str]) -> None:
    """Move every result but `evaluations`, `<candidate>/<suite>`, and write the constant mark of that."""
    for scores in sorted(RESULTS.glob(f"*/*/*/{SCORES}")):
        name = scores.parent.relative_to(RESULTS)
        if name.as_posix() not in evaluations:
            shutil.rmtree(REMOVED / name, ignore_errors=True)
            (REMOVED / name).parent.mkdir(parents=True, exist_ok=True)
            scores.parent.replace(REMOVED / name)
    write_json(TIDIED, {"data/results": "tidy"})


if __name__ == "__main__":
    entry(tidy)

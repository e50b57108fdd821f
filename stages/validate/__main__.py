"""Validate: read all of params.yaml and refuse it, every offender named, before any other stage runs.

Every other stage depends on this one's output, which never changes, so it runs at each edit of
params.yaml and makes nothing else run. It also writes the data set `none`, which is what a data-free
recipe is calibrated on: DVC's templates cannot leave a dependency out, so there is an empty one. Results
that params no longer name are removed (DVC's cache still has them), as the report depends on the whole
folder of results.
"""

import shutil
from pathlib import Path

from stages.core import run
from stages.core.atomic import write_json
from stages.core.calibration import DATASETS
from stages.core.params import Params

RESULTS = Path("data/results")
VALIDATED = Path("data/validated.json")


def validate(params: Params, name: str) -> None:
    """Write the constant marks that params.yaml is sound."""
    for found in sorted(RESULTS.glob("*/*/*/scores.parquet")):
        if found.parent.relative_to(RESULTS).as_posix() not in params.evaluations():
            shutil.rmtree(found.parent)
    write_json(VALIDATED, {"params.yaml": "valid"})
    write_json(DATASETS / "none" / "dataset.json", {"dataset": "none"})


if __name__ == "__main__":
    run.entry("validate", validate)

"""Validate: refuse a bad params.yaml, naming every mistake, before any recipe runs.

Every stage but `code` depends on this one's output, which never changes, so it runs at each edit of
params.yaml and makes nothing else run. It also writes the data set `none`, which a data-free recipe is
calibrated on: DVC's templates cannot leave a dependency out. Results that params no longer name are removed
(DVC's cache still has them), as the report depends on the whole folder of results.
"""

import shutil
from collections.abc import Sequence

from stages.core.files import DATASET, DATASETS, RESULTS, VALIDATED, write_json
from stages.core.tables import SCORES
from stages.job.entry import entry


def validate(evaluations: Sequence[str]) -> None:
    """Write the constant mark that params.yaml is sound; `evaluations` are those it names."""
    for scores in sorted(RESULTS.glob(f"*/*/*/{SCORES}")):
        if scores.parent.relative_to(RESULTS).as_posix() not in evaluations:
            shutil.rmtree(scores.parent)
    write_json(VALIDATED, {"params.yaml": "valid"})
    write_json(DATASETS / "none" / DATASET, {"dataset": "none"})


if __name__ == "__main__":
    entry(validate)

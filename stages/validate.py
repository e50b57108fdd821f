"""Validate: refuse a bad params.yaml, naming every mistake, before any recipe runs.

Every stage but `code` depends on this one's output, which never changes, so it runs at each edit of
params.yaml and makes nothing else run. It also writes the data set `none`, which a data-free recipe is
calibrated on, and the profile `none`, which lets the report read `data/profile` where nothing is measured:
DVC's templates cannot leave a dependency out.
"""

from stages.core.files import DATASET, DATASETS, PROFILES, VALIDATED, write_json
from stages.job.entry import entry


def validate() -> None:
    """Write the constant mark that params.yaml is sound."""
    write_json(VALIDATED, {"params.yaml": "valid"})
    write_json(DATASETS / "none" / DATASET, {"dataset": "none"})
    write_json(PROFILES / "none", {"profile": "none"})


if __name__ == "__main__":
    entry(validate)

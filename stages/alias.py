"""Alias: put a data set under the name of a further suite that scores it.

An evaluation depends on the data set of its suite's name, as DVC's templates cannot look another name up. The
copy costs no room in DVC's cache, which keeps equal files once.
"""

import shutil

from stages.core.files import DATASETS, writing
from stages.job.entry import entry


def alias(dataset: str, name: str) -> None:
    """Copy data/datasets/<dataset> to data/datasets/<name>."""
    with writing(DATASETS / name) as folder:
        shutil.copytree(DATASETS / dataset, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    entry(alias)

"""Download: fetch a model or data set from its pinned source and check it against its hash.

`base/<model>` is written to data/models/base/<model>, `datasets/<name>` to data/datasets/<name>.
"""

from typing import Any

from stages.core.run import Run
from stages.job.entry import entry


def download(source: Any, run: Run, name: str) -> None:
    """Download `base/<model>` or `datasets/<name>`.

    Args:
        source: the entry of section models or datasets.
    """
    kind, key = name.split("/")
    if kind == "base":
        source.download(key, run)
    else:
        source.download(key)


if __name__ == "__main__":
    entry(download)

"""Download: bring in a model or data set from its pinned source, checked against its hash.

`base/<model>` is written to data/models/base/<model>, `datasets/<name>` to data/datasets/<name>.
"""

from typing import Any

from stages.core.run import Run
from stages.job.entry import entry


def download(source: Any, run: Run, name: str) -> None:
    """Download `base/<model>` or `datasets/<name>` from its `source` in params."""
    kind, key = name.split("/")
    if kind == "base":
        source.download(key, run)
    else:
        source.download(key)


if __name__ == "__main__":
    entry(download)

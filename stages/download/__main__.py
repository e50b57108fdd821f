"""Download: bring in a model or data set from its pinned source, checked against its hash.

`base/<model>` is written to data/models/base/<model>, `datasets/<name>` to data/datasets/<name>.
"""

from stages.core import run
from stages.core.params import Params


def download(params: Params, name: str) -> None:
    """Download `base/<model>` or `datasets/<name>`."""
    params.run.start()
    kind, key = name.split("/")
    if kind == "base":
        params.models[key].download(key, params.run)
    else:
        params.datasets[key].download(key)


def recipes(params: Params) -> list[str]:
    """What there is to download."""
    return [f"base/{key}" for key in params.models] + [f"datasets/{key}" for key in params.datasets]


if __name__ == "__main__":
    run.entry("download", download, recipes)

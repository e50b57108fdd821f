"""Keep lm-eval's tasks from fetching code and data when they are loaded.

`evaluate` fetches the scripts of metrics and runs them; `nltk` fetches its data. Both packages take seconds
to import, and few tasks use either, so neither is imported to stop it: `evaluate` is replaced by a module
that has `code_eval` only (see `stages.evaluation.programs`), `nltk.downloader` by one that downloads nothing.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.core.errors import Refusal
from stages.evaluation.programs import CodeEval


def fetch_nothing() -> None:
    """Replace `evaluate` and `nltk.downloader` for the rest of the process."""
    _replace("evaluate", load=load_metric)
    refuse = refuse_download
    _replace("nltk.downloader", download=refuse, download_shell=refuse, download_gui=refuse)
    if nltk := sys.modules.get("nltk"):
        vars(nltk)["download"] = refuse


def _replace(name: str, **functions: Callable[..., Any]) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(functions)
    sys.modules[name] = module


def load_metric(name: str, *_: Any, **__: Any) -> CodeEval:
    """Load a metric, as `evaluate.load` does.

    Raises:
        Refusal: the metric is another than `code_eval`.
    """
    if name != "code_eval":
        raise Refusal(
            f"the task's metric {name} is a script on the hub, and fetched scripts are not run; choose "
            "another task."
        )
    return CodeEval()


def refuse_download(resource: str, *_: Any, **__: Any) -> None:
    """Refuse to download data of `nltk`.

    Raises:
        Refusal: always.
    """
    raise Refusal(
        f"the task needs nltk's {resource}, which is missing; set nltk_data of its data set to a zip of it, "
        "as docs/benchmarks.md shows."
    )


def add_nltk_data(folder: Path) -> None:
    """Let `nltk` find the data in a folder."""
    import nltk

    nltk.data.path.insert(0, str(folder.resolve()))

"""A user's own task: lm-eval's YAML with its data beside it, in a folder outside the project's source.

The YAML is lm-eval's (its docs/new_task_guide.md describes it). Its data lies in the same folder:
`dataset_path: json` (JSON or JSON Lines), `csv` or `parquet`, and the files of each split in `dataset_kwargs:
{data_files: ...}`. The folder has one hash, so an edit of the YAML or its data makes this task's suite stale
and no other. The download writes a parquet file a split and keeps the YAML in `task/`.

A `!function` of a YAML is code. It runs only from a `path:` source, where the
environment allows the commands of params.yaml.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from stages.core.consent import ALLOW, commands_are_allowed
from stages.core.errors import Refusal
from stages.core.files import contents
from stages.core.reading import reading
from stages.core.schema import Sha256
from stages.sources.dataset import Dataset
from stages.sources.origin import InnerPath, Origin, fetched

FOLDER = "task"
"""The folder of the YAML in the downloaded data set."""
_FORMATS = ("json", "csv", "parquet")
"""The values of `dataset_path` that are formats of files."""


class OwnTask(Dataset):
    """A YAML file of a task inside a folder, with the data that it names."""

    kind: Literal["task"]
    source: Origin
    yaml: Annotated[InnerPath, Field(min_length=1)]
    """The YAML's path inside the source."""
    sha256: Sha256
    """Of the whole source: the YAML, its data, and what else lies there."""

    @property
    def name(self) -> str:
        """The YAML as a suite's `task` names it."""
        return f"{self.source}/{self.yaml}"

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `<split>.parquet` for every split, and the YAML files and modules into `task/`.

        Raises:
            Refusal: the YAML is none of a task, or its data is missing, empty or damaged.
        """
        with fetched(self.source, "", self.sha256, data=True) as root:
            config = read_task(root, self.yaml)
            if (functions := _functions(config)) and not self.source.startswith("path:"):
                raise Refusal(
                    f"{self.source} {self.yaml} runs the code of {', '.join(functions)}, and only that of a "
                    "path: source is run; copy the task into a folder of your own, and read it."
                )
            for split, files in data_files(config, root, self.yaml).items():
                _write_split(config["dataset_path"], files, folder / f"{split}.parquet")
            for path in contents(root):
                if path.suffix in (".yaml", ".yml", ".py") and path.is_file():
                    target = folder / FOLDER / path.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
        return {"task": config["task"], "splits": sorted(file.stem for file in folder.glob("*.parquet"))}


class Function(NamedTuple):
    """A `!function` of a YAML: the dotted name of Python code."""

    name: str


def read_task(root: Path, file: str) -> dict[str, Any]:
    """Return a task's config with what it includes; each `!function` is a `Function`.

    Args:
        root: the folder that no include may leave.
        file: the YAML, a path inside `root`.

    Raises:
        Refusal: it is missing, no YAML, or defines no single task; or it holds code that is not allowed.
    """
    config = _merged(root, file, ())
    if not isinstance(config.get("task"), str) or "group" in config or "task_list" in config:
        raise Refusal(
            f"{root / file} defines no single task; write `task: <name>` and leave out group and task_list."
        )
    if "class" in config:
        raise Refusal(f"{root / file} names a Python class; write the task in YAML.")
    if (functions := _functions(config)) and not commands_are_allowed():
        raise Refusal(
            f"{root / file} runs the code of {', '.join(functions)}; if you trust it, set {ALLOW}=1 in the "
            "environment, or write the field as a template."
        )
    return config


def _merged(root: Path, file: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the fields of a YAML over those of the files that it includes."""
    import yaml

    class Loader(yaml.SafeLoader):
        """As lm-eval's, but without importing functions."""

    Loader.add_constructor("!function", lambda _, node: Function(str(node.value)))
    path = root / file
    if not path.is_file():
        raise Refusal(f"{path} is {'a folder' if path.is_dir() else 'missing'}; name the task's YAML file.")
    if path in seen or not path.resolve().is_relative_to(root.resolve()):
        raise Refusal(f"{path} is included by itself or lies outside {root}; include files of this folder.")
    try:
        with path.open("rb") as opened:  # errors name the file
            config = yaml.load(opened, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise Refusal(f"{path} holds {type(config).__name__}, not fields of a task; write `task: <name>`.")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        inner = os.path.normpath((Path(file).parent / str(other)).as_posix())
        merged |= _merged(root, inner, (*seen, path))
    return merged | config


def _functions(value: Any) -> list[str]:
    """Return the names of all functions at any depth."""
    if isinstance(value, Function):
        return [value.name]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [name for item in inner for name in _functions(item)]


def data_files(config: Mapping[str, Any], root: Path, file: str) -> dict[str, list[Path]]:
    """Return the files of each split of a task.

    Raises:
        Refusal: the task reads no files, or some are missing or lie outside the folder.
    """
    kind, given = config.get("dataset_path"), (config.get("dataset_kwargs") or {}).get("data_files")
    if kind not in _FORMATS or not given:
        raise Refusal(
            f"{root / file} has dataset_path {kind!r}; set it to {', '.join(_FORMATS[:-1])} or "
            f"{_FORMATS[-1]}, and dataset_kwargs: {{data_files: {{test: <file beside the YAML>}}}}."
        )
    named = given if isinstance(given, Mapping) else {"train": given}
    folder = (root / file).parent
    by_split = {
        str(split): [folder / str(name) for name in (names if isinstance(names, list) else [names])]
        for split, names in named.items()
    }
    inside = root.resolve()
    if lost := [
        path
        for paths in by_split.values()
        for path in paths
        if not path.is_file() or not path.resolve().is_relative_to(inside)
    ]:
        raise Refusal(
            f"{root / file} names {', '.join(str(path.relative_to(folder)) for path in lost)}, which is no "
            "file of its folder; put the data beside the YAML."
        )
    return by_split


def _write_split(kind: str, files: list[Path], target: Path) -> None:
    """Write the rows of some files as one parquet file."""
    import datasets

    datasets.disable_progress_bars()
    readers = {
        "json": datasets.Dataset.from_json,
        "csv": datasets.Dataset.from_csv,
        "parquet": datasets.Dataset.from_parquet,
    }
    names = ", ".join(file.name for file in files)
    with tempfile.TemporaryDirectory(prefix="prunequant-") as cache:
        with reading(f"{names}, as {kind},"):
            rows = readers[kind]([str(file) for file in files], cache_dir=cache)
        if not len(rows):
            raise Refusal(f"{names} has no rows; a split needs items.")
        rows.to_parquet(target)


def metrics(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the metrics that a task leaves to lm-eval by name; none if its own code scores."""
    if isinstance(config.get("process_results"), Function):
        return
    for entry in config.get("metric_list") or []:
        if isinstance(entry, Mapping) and isinstance(entry.get("metric"), str):
            yield entry["metric"]

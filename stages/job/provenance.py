"""Provenance: the inputs of a stage's result, fixed when the stage begins.

DVC hashes a stage's dependencies after its command has ended. If params.yaml, the code or a source changed
meanwhile, dvc.lock would name inputs that the result was not computed from. So a stage notes its inputs
before it works, and fails at its end if any of them has changed: then DVC locks nothing.

An edit after the command's end and before DVC's hashing escapes this. So the stage also writes its inputs to
`data/provenance/<stage>/<recipe>.json`, an output beside its result, and whoever reads the result compares
the two (`disagreement`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stages.core import identity
from stages.core.errors import Refusal
from stages.core.files import (
    CODE,
    DATASETS,
    MODELS,
    PROFILES,
    PROVENANCE,
    RESULTS,
    VALIDATED,
    read_json,
    write_json,
)
from stages.job.load import PARAMS, read
from stages.job.locked import locked_stages, outs
from stages.job.params import Params
from stages.job.pieces import STAGES, method_of

REQUIREMENTS = Path("requirements.lock")
UNTRACED = ("code", "validate", "tidy")
"""Stages without a provenance file: they take a second, and what they write is checked otherwise."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of one stage's result, as they were when the stage began."""

    stage: str
    name: str
    params: Mapping[str, Any]
    """The values in params.yaml by dotted key, as dvc.lock has them."""
    deps: Mapping[str, str | None]
    """The MD5 of each dependency as dvc.lock has it; None if that is unknown, as without a dvc.lock."""
    contents: Mapping[Path, Any] = field(default_factory=dict)
    """The content of each dependency, see `content`."""
    whole_params: Any = None
    """The content of all of params.yaml."""
    module: str | None = None
    """The module of the stage's method."""
    code: str = ""
    """The identity of the code, see `stages.core.identity`."""
    stamps: Mapping[Path, Any] = field(default_factory=dict)
    """The size, mtime and inode of each file of the code."""

    def check(self) -> None:
        """Refuse inputs that are no longer what they were.

        Raises:
            Refusal: names every input that has changed.
        """
        changed = [str(path) for path, before in self.contents.items() if content(path) != before]
        if content(PARAMS) != self.whole_params:
            now = read()
            changed += [f"{key} in {PARAMS}" for key in self.params if _value(now, key) != self.params[key]]
        if _stamps(self.stamps) != self.stamps:
            identity.forget()
            now_lines = identity.text(identity.of(self.stage, self.module)).splitlines()
            lines = {*self.code.splitlines()} ^ {*now_lines}
            changed += sorted({line.split("  ")[1] for line in lines})
        if changed:
            raise Refusal(
                f"{', '.join(changed)} changed while this stage ran; its result is dropped and nothing is "
                "locked. Run it again."
            )

    def write(self) -> None:
        """Write the provenance file, unless the stage has none."""
        if self.stage not in UNTRACED:
            file = path_of(self.stage, self.name)
            write_json(file, {"params": dict(self.params), "deps": dict(self.deps)})


def inputs(stage: str, name: str, raw: Mapping[str, Any], params: Params, whole_params: Any) -> Inputs:
    """Note the inputs of a stage's recipe.

    Args:
        raw: params.yaml as it is parsed; `params` is the same, checked.
        whole_params: `content` of params.yaml before it was read.
    """
    pieces = STAGES[stage]
    method, module = method_of(stage, params, name)
    files = [REQUIREMENTS, PARAMS if stage == "validate" else VALIDATED]
    if stage == "code":
        files = [Path("stages")]
    else:
        files.append(CODE / stage / method)
    folders = [MODELS / model for model in pieces.models(params, name)]
    folders += [DATASETS / dataset for dataset in pieces.datasets(params, name)]
    if stage == "report":
        folders += reported(params)
    # What tells a later change comes before what it is compared with, so that no change falls between.
    contents = {path: content(path) for path in [*files, *folders]}
    stamps = _stamps((identity.ROOT / "stages").rglob("*"))
    locked = outs(locked_stages(map(str, folders)))
    modules = identity.of(stage, module)
    return Inputs(
        stage=stage,
        name=name,
        params={key: _value(raw, key) for key in pieces.keys(params, name)},
        deps={
            str(path): locked.get(str(path)) if path in folders else contents[path]
            for path in contents
            if path != Path("stages")
        },
        contents=contents,
        whole_params=whole_params,
        module=module,
        stamps={file: stamps[file] for file in stamps if str(file.relative_to(identity.ROOT)) in modules},
        code=identity.text(modules),
    )


def reported(params: Params) -> list[Path]:
    """Return the folders that the report reads."""
    return [
        *(RESULTS / evaluation for evaluation in params.evaluations()),
        *(PROFILES / candidate for candidate in params.profile.candidates),
    ]


def path_of(stage: str, name: str) -> Path:
    """Return the provenance file of a stage's recipe."""
    return PROVENANCE / stage / f"{name}.json"


def removed(stage: str, name: str) -> list[str]:
    """Return the outputs of a stage's recipe that dvc.lock names and that are not there."""
    try:
        lock = locked_stages()
    except Refusal:
        return []
    for entry in lock.values():
        paths = [out["path"] for out in entry.get("outs", ())]
        if str(path_of(stage, name)) in paths:
            return [path for path in paths if not Path(path).exists()]
    return []


def disagreements(
    lock: Mapping[str, Mapping[str, Any]], wanted: Iterable[str] | None = None
) -> dict[str, str]:
    """Compare provenance files with dvc.lock; what a file calls unknown is no difference.

    A file is compared only if it is the one that dvc.lock lists. Otherwise the results here are others than
    the lock's, as after `git pull` or where a worker computed them, and DVC knows that by itself.

    Args:
        wanted: outputs, such as `data/models/prune/wanda-50`, whose stages are compared; None is all.

    Returns:
        for each stage whose lock entry names other inputs than its result was computed from, those inputs.
    """
    current = outs(lock)
    chosen = None if wanted is None else set(wanted)
    differing: dict[str, str] = {}
    for stage, entry in lock.items():
        made = {out["path"]: out.get("md5") for out in entry.get("outs", ())}
        file = next((Path(path) for path in made if Path(path).is_relative_to(PROVENANCE)), None)
        if file is None or (chosen is not None and not chosen & set(made)):
            continue
        if not file.exists() or _md5(file) != made[str(file)]:
            continue
        noted = read_json(file)
        named = {dep["path"]: dep["md5"] for dep in entry.get("deps", ())}
        known = {path: md5 for path, md5 in noted["deps"].items() if md5 is not None}
        wrong = [path for path, md5 in known.items() if named.get(path, md5) != md5]
        # The report notes each result, while its lock entry has the hash of their folder.
        inside = [path for path in known if path not in named and any(map(Path(path).is_relative_to, named))]
        wrong += [path for path in known if path not in named and path not in inside]
        within = [path for path in inside if current.get(path, known[path]) != known[path]]
        if within and all(folder_md5(Path(path)) == named[path] for path in named if Path(path).is_dir()):
            wrong += within  # otherwise results have changed since, and DVC knows that the report is stale
        values = dict((entry.get("params") or {}).get(str(PARAMS), {}))
        wrong += [f"{key} in {PARAMS}" for key in values if not _same(noted["params"].get(key), values[key])]
        if wrong:
            differing[stage] = ", ".join(wrong)
    return differing


def _same(noted: Any, locked: Any) -> bool:
    """Compare a value of params.yaml with the same in dvc.lock, which a fast parser reads as YAML 1.1.

    It takes 5e-05 for a word, 2:4 for a number to base 60, and on for true.
    """
    if isinstance(noted, Mapping) and isinstance(locked, Mapping):
        return noted.keys() == locked.keys() and all(_same(noted[key], locked[key]) for key in noted)
    if isinstance(noted, list) and isinstance(locked, list):
        return len(noted) == len(locked) and all(map(_same, noted, locked))
    if isinstance(noted, float) and isinstance(locked, str):
        return repr(noted) == repr(float(locked)) if re.fullmatch(r"[-+.\de]+", locked) else False
    if isinstance(noted, str) and not isinstance(locked, str):
        try:
            return bool(yaml.safe_load(noted) == locked)
        except yaml.YAMLError:
            return False
    return bool(noted == locked)


def _value(raw: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None if there is none."""
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def content(path: Path) -> Any:
    """Return what tells whether a file or folder has changed, without reading large ones.

    A file's MD5; of a folder the size, mtime and inode of every file.
    """
    if not path.is_dir():
        return _md5(path)
    return _stamps(file for file in path.rglob("*") if "__pycache__" not in file.parts)


def _stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Return the size, mtime in ns and inode of every file."""
    stats = {file: file.stat() for file in files if file.is_file()}
    return {file: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats.items()}


def folder_md5(folder: Path) -> str:
    """Return the MD5 of a folder as dvc.lock has it: of the MD5 of each file in it."""
    files = sorted(
        (file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file()
    )
    listed = [{"md5": _md5(file), "relpath": path} for path, file in files]
    return f"{hashlib.md5(json.dumps(listed).encode(), usedforsecurity=False).hexdigest()}.dir"


def _md5(file: Path) -> str | None:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() if file.exists() else None

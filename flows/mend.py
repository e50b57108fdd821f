"""Results that disagree with dvc.lock, and what kills and full disks leave behind: find it and clear it away.

For a result to be computed from other inputs than dvc.lock says, it takes an edit between the end of a
stage's command and DVC's hashing of its inputs (see `stages.job.provenance`). DVC then locks the edited
inputs, and its run cache would give the wrong result back whenever it meets them.
"""

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.graph import DVC, Graph
from flows.workspace import DVC_TMP
from stages.core.files import DATA, PROVENANCE
from stages.job import provenance

_HALF = re.compile(r"\.[\w-]{22}\.tmp|\..+\.\d+")
"""The name of a file while it is written: DVC's, or `stages.core.files.replacing`'s."""


def clear_away() -> None:
    """Delete files that were left half written; call it while nobody else works here.

    In an output they would make it differ from what dvc.lock says, in data/results the report's input.
    """
    places = [*DATA.rglob(".*"), *DVC_TMP.glob(".*"), *Path().glob(f".{provenance.LOCK}.*")]
    for file in places:
        if _HALF.fullmatch(file.name) and file.is_file():
            file.unlink()


def find_wrong(graph: Graph, locked: provenance.Lock) -> dict[str, str]:
    """Return the stages of `graph` whose result disagrees with dvc.lock, each with the inputs that differ."""
    wrong = provenance.disagreements(locked)
    return {name: inputs for name, inputs in wrong.items() if name in graph}


def forget_runs(names: set[str]) -> None:
    """Delete the entries of DVC's run cache that hold the present results of stages `names`."""
    from dvc.repo import Repo

    locked = provenance.locked_stages()
    results = {_provenance(locked[name]) for name in names}
    for file in (Path(Repo().cache.local.path) / "../../runs").resolve().glob("*/*/*"):
        if _provenance(yaml.safe_load(file.read_text(encoding="utf-8"))) in results:
            file.unlink()


def restore(outs: Iterable[str]) -> None:
    """Bring back outputs that dvc.lock names and DVC has removed before a stage that then failed."""
    if missing := [out for out in outs if not Path(out).exists()]:
        subprocess.run([*DVC, "checkout", *missing], capture_output=True)  # a stage that never ran has none


def _provenance(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return the path and the MD5 of a lock entry's provenance file."""
    outs = {out["path"]: out["md5"] for out in entry.get("outs", ())}
    return next(((path, md5) for path, md5 in outs.items() if path.startswith(f"{PROVENANCE}/")), ("", ""))

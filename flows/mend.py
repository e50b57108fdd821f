"""Results that disagree with dvc.lock, and what kills and full disks leave behind: find it and clear it away.

For a result to be computed from other inputs than dvc.lock says, it takes an edit between the end of a
stage's command and DVC's hashing of its inputs (see `stages.job.provenance`). DVC then locks the edited
inputs, and its run cache would give the wrong result back whenever it meets them.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.graph import Graph
from flows.workspace import DVC_TMP
from stages.core.files import DATA, PROVENANCE
from stages.job import provenance
from stages.job.locked import LOCK, locked_stages

_HALF = re.compile(r"\.[\w-]{22}\.tmp|\..+\.\d+")
"""The name of a file while it is written: DVC's, or `stages.core.files.replacing`'s."""


def clear_away() -> None:
    """Delete files that were left half written; call it while nobody else works here.

    In an output they would make it differ from what dvc.lock says, in data/results the report's input.
    """
    places = [*DATA.rglob(".*"), *DVC_TMP.glob(".*"), *Path().glob(f".{LOCK}.*")]
    for file in places:
        if _HALF.fullmatch(file.name) and file.is_file():
            file.unlink()


def find_wrong(graph: Graph, locked: Mapping[str, Any]) -> dict[str, str]:
    """Return the stages of `graph` whose result disagrees with dvc.lock, each with the inputs that differ."""
    wrong = provenance.disagreements(locked)
    return {name: inputs for name, inputs in wrong.items() if name in graph}


def forget_runs(names: set[str]) -> None:
    """Delete the entries of DVC's run cache that hold the present results of stages `names`."""
    from dvc.repo import Repo

    locked = locked_stages()
    results = {_provenance(locked[name]) for name in names}
    for file in (Path(Repo().cache.local.path) / "../../runs").resolve().glob("*/*/*"):
        if _provenance(yaml.safe_load(file.read_text(encoding="utf-8"))) in results:
            file.unlink()


def restore(entry: Mapping[str, Any]) -> None:
    """Bring back the outputs of a dvc.lock entry that DVC has removed before its stage ended badly.

    They come straight from DVC's cache: `dvc checkout` reads params.yaml, which may be what broke the stage.
    An output that the cache lacks, or the disk has no room for, stays away; the next run makes it.
    """
    missing = [out for out in entry.get("outs", ()) if "md5" in out and not Path(out["path"]).exists()]
    if not missing:
        return
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.checkout import CheckoutError, checkout
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_objects.fs.local import LocalFileSystem

    cache = Repo().cache.local
    for out in missing:
        with contextlib.suppress(OSError, CheckoutError):
            result = load(cache, HashInfo("md5", out["md5"]))
            checkout(str(Path(out["path"]).absolute()), LocalFileSystem(), result, cache, force=True)


def _provenance(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return the path and the MD5 of a lock entry's provenance file."""
    outs = {out["path"]: out["md5"] for out in entry.get("outs", ())}
    return next(((path, md5) for path, md5 in outs.items() if path.startswith(f"{PROVENANCE}/")), ("", ""))

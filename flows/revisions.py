"""One revision of the project as it was: its params, its locked outputs, and their files in DVC's cache.

Nothing is checked out and nothing is fetched. A file whose bytes are not in the cache is told to the
caller as missing, so that everything else can still be shown.
"""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stages.core.errors import Refusal

WORKSPACE = "workspace"


@dataclass
class Revision:
    """A git revision, or the workspace.

    Attributes:
        name: as the user gave it.
        params: params.yaml as plain values.
        outs: path -> entry of dvc.lock (`md5`, `size`), of everything params.yaml still asks for.
        missing: outputs wanted so far of which the cache lacks something.
    """

    name: str
    params: dict[str, Any]
    outs: dict[str, dict[str, Any]]
    cache: Path
    missing: set[str] = field(default_factory=set)

    def hash(self, out: str) -> str | None:
        """The md5 of an output; None where there is no such output."""
        return self.outs[out]["md5"] if out in self.outs else None

    def files(self, out: str) -> dict[str, Path]:
        """The files of an output by their path inside it; empty, and noted, where one is not there."""
        tree = self._locate(self.outs[out]["md5"], Path(out))
        if tree is None:
            self.missing.add(out)
            return {}
        if tree.is_dir():
            return {str(file.relative_to(tree)): file for file in sorted(tree.rglob("*")) if file.is_file()}
        found: dict[str, Path] = {}
        for entry in json.loads(tree.read_text()):
            file = self._locate(entry["md5"], Path(out, entry["relpath"]))
            if file is None:
                self.missing.add(out)
            else:
                found[entry["relpath"]] = file
        return found

    def file(self, out: str, name: str) -> Path | None:
        """One file of an output; None where the output or the file is not there."""
        return self.files(out).get(name) if out in self.outs else None

    def _locate(self, md5: str, path: Path) -> Path | None:
        cached = self.cache / md5[:2] / md5[2:]
        if cached.exists():
            return cached
        return path if self.name == WORKSPACE and path.exists() else None


def read(name: str | None) -> Revision:
    """The revision of this name (commit, branch, tag or DVC experiment), None being the workspace.

    Raises:
        Refusal: there is no such revision, or it holds no params.yaml.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import NoSCM, RevError, resolve_rev

    try:
        repo = Repo()
    except DvcException as error:
        raise Refusal(f"{error}; run from the root of a prunequant project.") from None
    cache = Path(repo.cache.local.path)
    if name is None:
        texts = {path: _text(Path(path)) for path in ("params.yaml", "dvc.lock")}
    else:
        if isinstance(repo.scm, NoSCM):
            raise Refusal("this project is not in git, so there are no revisions to compare.")
        try:
            commit = resolve_rev(repo.scm, name)
        except RevError:
            raise Refusal(
                f"there is no revision {name!r}; give a commit, a branch, a tag or an experiment."
            ) from None
        texts = {path: _show(commit, path) for path in ("params.yaml", "dvc.lock")}
    if texts["params.yaml"] is None:
        raise Refusal(f"{name or WORKSPACE} holds no params.yaml.")
    params = yaml.safe_load(texts["params.yaml"])
    lock = yaml.load(texts["dvc.lock"] or "{}", yaml.CSafeLoader)
    outs = {
        out["path"]: out
        for stage in lock.get("stages", {}).values()
        for out in stage.get("outs", [])
        if _wanted(out["path"], params)
    }
    return Revision(name or WORKSPACE, params, outs, cache)


def _wanted(out: str, params: dict[str, Any]) -> bool:
    """Whether params still ask for an output; dvc.lock remembers recipes that were taken out."""
    kind, _, rest = out.removeprefix("data/").partition("/")
    if kind == "datasets":
        return rest == "none" or rest in params["datasets"]
    if kind == "models":
        stage, _, recipe = rest.partition("/")
        return recipe in params["models" if stage == "base" else stage]
    if kind == "results":
        candidate, _, suite = rest.rpartition("/")
        suites = {name for group in params["suites"].values() for name in group}
        return candidate in params["evaluate"]["candidates"] and suite in suites
    return True


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _show(commit: str, path: str) -> str | None:
    done = subprocess.run(["git", "show", f"{commit}:./{path}"], capture_output=True, text=True)
    return None if done.returncode else done.stdout

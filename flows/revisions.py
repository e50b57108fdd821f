"""A past revision of the project: its params, its locked outputs, and their files in DVC's cache.

Nothing is checked out or fetched. Outputs that the cache lacks are noted as missing, so that everything
else can still be shown.
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
        name: as the user typed it.
        params: params.yaml as plain values.
        outs: path -> entry of dvc.lock (`md5`, `size`), for all outputs that params.yaml still names.
        missing: outputs requested so far that the cache lacks in part or whole.
    """

    name: str
    params: dict[str, Any]
    outs: dict[str, dict[str, Any]]
    cache: Path
    missing: set[str] = field(default_factory=set)

    def hash(self, out: str) -> str | None:
        """Return the md5 of an output; None if there is no such output."""
        return self.outs[out]["md5"] if out in self.outs else None

    def files(self, out: str) -> dict[str, Path]:
        """Return an output's files by their path inside it; note it as missing if any is not cached."""
        tree = self._locate(self.outs[out]["md5"], Path(out))
        if tree is None:
            self.missing.add(out)
            return {}
        if tree.is_dir():
            return {str(file.relative_to(tree)): file for file in sorted(tree.rglob("*")) if file.is_file()}
        files: dict[str, Path] = {}
        for entry in json.loads(tree.read_text()):
            file = self._locate(entry["md5"], Path(out, entry["relpath"]))
            if file is None:
                self.missing.add(out)
            else:
                files[entry["relpath"]] = file
        return files

    def file(self, out: str, name: str) -> Path | None:
        """Return a file of an output; None if the output or the file is missing."""
        return self.files(out).get(name) if out in self.outs else None

    def _locate(self, md5: str, path: Path) -> Path | None:
        cached = self.cache / md5[:2] / md5[2:]
        if cached.exists():
            return cached
        return path if self.name == WORKSPACE and path.exists() else None


def read_revision(name: str | None) -> Revision:
    """Read the revision of this name: a commit, branch, tag or DVC experiment; None is the workspace.

    Raises:
        Refusal: there is no such revision, or it has no params.yaml.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import NoSCM, RevError, resolve_rev

    try:
        repo = Repo()
    except DvcException as error:
        raise Refusal(f"{error}; run this in the root of a prunequant project.") from None
    cache = Path(repo.cache.local.path)
    if name is None:
        texts = {path: _text(Path(path)) for path in ("params.yaml", "dvc.lock")}
    else:
        if isinstance(repo.scm, NoSCM):
            raise Refusal("this project is not in git, so it has no revisions to compare.")
        try:
            commit = resolve_rev(repo.scm, name)
        except RevError:
            raise Refusal(
                f"there is no revision {name!r}; give a commit, a branch, a tag or an experiment."
            ) from None
        texts = {path: _show(commit, path) for path in ("params.yaml", "dvc.lock")}
    if texts["params.yaml"] is None:
        raise Refusal(f"{name or WORKSPACE} has no params.yaml; choose a revision of a prunequant project.")
    params = yaml.safe_load(texts["params.yaml"])
    lock = yaml.load(texts["dvc.lock"] or "{}", yaml.CSafeLoader)
    outs = {
        out["path"]: out
        for stage in lock.get("stages", {}).values()
        for out in stage.get("outs", [])
        if is_named(out["path"], params)
    }
    return Revision(name or WORKSPACE, params, outs, cache)


def is_named(out: str, params: dict[str, Any]) -> bool:
    """Tell whether params.yaml still names a result; dvc.lock keeps those of recipes that were removed."""
    kind, _, rest = out.removeprefix("data/").partition("/")
    if kind == "datasets":
        known = [params["datasets"], params.get("teach", {}), params["suites"].get("datasets", {})]
        return rest == "none" or any(rest in section for section in known)
    if kind == "models":
        stage, _, recipe = rest.partition("/")
        return recipe in params["models" if stage == "base" else stage]
    if kind == "results":
        candidate, _, suite = rest.rpartition("/")
        suites = {name for group in params["suites"].values() for name in group}
        return candidate in params["evaluate"]["candidates"] and suite in suites
    if kind == "provenance":
        return False  # what it names is compared itself
    if kind == "curves":
        return rest.removesuffix(".csv") in params.get("finetune", {})
    if kind == "profile":
        return rest in params.get("profile", {}).get("candidates", [])
    return True


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _show(commit: str, path: str) -> str | None:
    process = subprocess.run(["git", "show", f"{commit}:./{path}"], capture_output=True, text=True)
    return None if process.returncode else process.stdout

"""A past revision of the project: its params, its locked outputs, and their files in DVC's cache.

Nothing is checked out. Outputs that the cache lacks are noted as missing, so that everything else can still
be shown; `fetch` brings them from a remote into the cache, and no file of the workspace changes.
"""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stages.core.errors import Refusal
from stages.core.files import RESULTS

WORKSPACE = "workspace"
_FILES = ("params.yaml", "dvc.lock", "requirements.lock")


@dataclass
class Revision:
    """A git revision, or the workspace.

    Attributes:
        name: as the user typed it.
        params: params.yaml as plain values.
        outs: path -> entry of dvc.lock (`md5`, `size`), for all outputs that params.yaml still names.
        cache: the folder of DVC's cache that holds files by their md5.
        stages: entries of dvc.lock by stage.
        versions: requirements.lock as text; None if there is none.
        missing: outputs requested so far that the cache lacks in part or whole.
        unread: likewise those that hold nothing but the questions behind answers.
    """

    name: str
    params: dict[str, Any]
    outs: dict[str, dict[str, Any]]
    cache: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: str | None = None
    missing: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)

    def hash(self, out: str) -> str | None:
        """Return the md5 of an output; None if there is no such output."""
        return self.outs[out]["md5"] if out in self.outs else None

    def files(self, out: str) -> dict[str, Path]:
        """Return an output's files by their path inside it; note it as missing if any is not cached."""
        files = self._files(out)
        if None in files.values() or not files:
            self.missing.add(out)
        return {name: file for name, file in files.items() if file}

    def file(self, out: str, name: str, *, questions: bool = False) -> Path | None:
        """Return a file of an output; None if the output has no such file, or the cache lacks it.

        Args:
            questions: whether to note the output as `unread`, not `missing`, if the cache lacks the file.
        """
        if out not in self.outs:
            return None
        files = self._files(out)
        if not files or (name in files and files[name] is None):
            (self.unread if questions else self.missing).add(out)
        return files.get(name)

    def _files(self, out: str) -> dict[str, Path | None]:
        """Return an output's files, None for one that is not cached; nothing if not even the list is."""
        tree = self._locate(self.outs[out]["md5"], Path(out))
        if tree is None:
            return {}
        if tree.is_dir():
            return {str(file.relative_to(tree)): file for file in sorted(tree.rglob("*")) if file.is_file()}
        if not self.outs[out]["md5"].endswith(".dir"):
            return {"": tree}
        return {
            entry["relpath"]: self._locate(entry["md5"], Path(out, entry["relpath"]))
            for entry in json.loads(tree.read_text())
        }

    def _locate(self, md5: str, path: Path) -> Path | None:
        cached = self.cache / md5[:2] / md5[2:]
        if cached.exists():
            return cached
        return path if self.name == WORKSPACE and path.exists() else None


def read_revision(name: str | None) -> Revision:
    """Read the revision of this name: a commit, branch, tag or DVC experiment.

    Args:
        name: `workspace` or None: the files as they are.

    Raises:
        Refusal: there is no such revision, or its params.yaml or dvc.lock cannot be read.
    """
    from dvc.scm import NoSCM, RevError, resolve_rev

    repo = _project()
    cache = Path(repo.cache.local.path)
    if name in (None, WORKSPACE):
        texts = {path: _text(Path(path)) for path in _FILES}
    else:
        if isinstance(repo.scm, NoSCM):
            raise Refusal("this project is not in git, so it has no revisions to compare.")
        try:
            commit = resolve_rev(repo.scm, name)
        except RevError:
            raise Refusal(
                f"there is no revision {name!r}; give a commit, a branch, a tag or an experiment."
            ) from None
        texts = {path: _show(commit, path) for path in _FILES}
    if texts["params.yaml"] is None:
        raise Refusal(f"{name or WORKSPACE} has no params.yaml; choose a revision of a prunequant project.")
    params = _settings(texts["params.yaml"], "params.yaml", name or WORKSPACE)
    stages = _settings(texts["dvc.lock"] or "{}", "dvc.lock", name or WORKSPACE).get("stages", {})
    outs = {
        out["path"]: out
        for stage in stages.values()
        for out in stage.get("outs", [])
        if is_named(out["path"], params)
    }
    return Revision(name or WORKSPACE, params, outs, cache, stages, texts["requirements.lock"])


def is_revision(name: str) -> bool:
    """Tell whether this is the workspace, or git or DVC knows a revision of this name."""
    from dvc.scm import NoSCM, RevError, resolve_rev

    if name == WORKSPACE:
        return True
    repo = _project()
    try:
        return not isinstance(repo.scm, NoSCM) and bool(resolve_rev(repo.scm, name))
    except RevError:
        return False


def lacking_results(gap: dict[str, Any]) -> list[str]:
    """Return the results that a revision's gap holds, without those that lack for their questions alone."""
    return [
        out["path"]
        for out in gap["outputs"]
        if Path(out["path"]).is_relative_to(RESULTS) and not out["questions"]
    ]


def fetch(outs: Iterable[dict[str, Any]], remote: str | None) -> None:
    """Bring outputs, as far as a DVC remote has them, into the cache; the workspace stays as it is.

    Args:
        outs: entries of dvc.lock.
        remote: its name in DVC's config; None: the default one.

    Raises:
        Refusal: there is no such remote, or it does not answer.
    """
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.hash_info import HashInfo

    wanted = {out["md5"] for out in outs}
    if not wanted:
        return
    project = _project()
    cache = Path(project.cache.local.path)

    def bring(hashes: set[str]) -> None:
        project.cloud.pull({HashInfo("md5", md5) for md5 in hashes}, remote=remote)

    try:
        bring(wanted)
        trees = [cache / md5[:2] / md5[2:] for md5 in wanted if md5.endswith(".dir")]
        bring({entry["md5"] for tree in trees if tree.exists() for entry in json.loads(tree.read_text())})
    except (DvcException, OSError) as error:
        raise Refusal(f"cannot fetch from the DVC remote {remote or '(the default)'}: {error}") from None


def _project() -> Any:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        return Repo()
    except DvcException as error:
        raise Refusal(f"{error}; run this in the root of a prunequant project.") from None


def recipes_of(revision: Revision, candidate: str) -> dict[str, Any]:
    """Return the settings that lead to a candidate, by stage, from its base on.

    A stage used again, as by a recipe made from one of the same section, is called `<stage>/<recipe>`.

    Raises:
        Refusal: params.yaml lacks the candidate, or what it is made from.
    """
    chain = []
    while candidate:
        stage, _, name = candidate.partition("/")
        known = _section(revision.params, stage)
        if name not in known:
            raise Refusal(
                f"params.yaml of {revision.name} has no recipe {candidate}, which others name; `prunequant "
                "check` lists such mistakes."
            )
        settings = dict(known[name])
        candidate = settings.pop("source") if stage != "base" else ""
        chain.append((stage, name, settings))
    steps: dict[str, Any] = {}
    for stage, name, settings in reversed(chain):
        steps[f"{stage}/{name}" if stage in steps else stage] = settings
    return steps


def is_named(out: str, params: dict[str, Any]) -> bool:
    """Tell whether params.yaml still names a result; dvc.lock keeps those of recipes that were removed."""
    kind, _, rest = out.removeprefix("data/").partition("/")
    suites = params.get("suites", {})
    if kind == "datasets":
        known = [*(params.get(section, {}) for section in ("datasets", "teach")), suites.get("datasets", {})]
        return rest == "none" or any(rest in section for section in known)
    if kind == "models":
        stage, _, recipe = rest.partition("/")
        return recipe in _section(params, stage)
    if kind == "results":
        candidate, _, suite = rest.rpartition("/")
        known = params.get("evaluate", {}).get("candidates", [])
        return candidate in known and any(suite in group for group in suites.values())
    if kind == "provenance":
        return False  # what it names is compared itself
    if kind == "curves":
        return rest.removesuffix(".csv") in params.get("finetune", {})
    if kind == "profile":
        return rest in params.get("profile", {}).get("candidates", [])
    return True


def _section(params: dict[str, Any], stage: str) -> dict[str, Any]:
    """Return the models or the recipes that a stage makes."""
    section: dict[str, Any] = params.get("models" if stage == "base" else stage, {})
    return section


def _settings(text: str, path: str, revision: str) -> dict[str, Any]:
    """Return a file of YAML as plain values, without sections that are empty."""
    try:
        settings = yaml.load(text, yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise Refusal(f"{path} of {revision} is no YAML: {' '.join(str(error).split())}; mend it.") from None
    if not isinstance(settings, dict):
        raise Refusal(f"{path} of {revision} has no sections; mend it, or `git checkout {path}`.")
    return {name: section for name, section in settings.items() if section is not None}


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _show(commit: str, path: str) -> str | None:
    process = subprocess.run(["git", "show", f"{commit}:./{path}"], capture_output=True, text=True)
    return None if process.returncode else process.stdout

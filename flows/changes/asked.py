"""What `prunequant diff` is asked to compare: two revisions, or candidates of one.

A word that names a candidate of the workspace is a candidate, any other a revision. Candidates of another
revision are asked for with `--at`, where every word is a candidate. A word that could be both is refused.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.changes import Fetched
from flows.changes.revisions import WORKSPACE, Revision, fetch, is_revision, read_revision
from stages.core.errors import Refusal
from stages.core.files import MODELS
from stages.core.schema import RECIPES
from stages.job.sentences import allowed


def compare(
    names: Sequence[str],
    at: str | None = None,
    fetched: Fetched | None = None,
    remote: str | None = None,
    *,
    tensors: bool = True,
) -> dict[str, Any]:
    """Compare revisions, or candidates of one, and say what the cache lacks and how to bring it.

    Args:
        names: one or two revisions, of which a second one left out is the workspace; or candidates.
        at: the revision of the candidates; None: the workspace, and names may be revisions.
        fetched: what to bring from the remote first; None: nothing.
        remote: its name in DVC's config; None: the default one.
        tensors: whether to compare the tensors of models, which takes longest.

    Raises:
        Refusal: a name is neither, or both; or the remote lacks what was asked for.
    """
    tried = set[str]()
    while fetched and (lacking := _lacking(_compared(names, at, tensors=False), fetched)):
        if lost := [out["path"] for out in lacking if out["md5"] in tried]:
            raise Refusal(
                f"{len(lost)} output(s), such as {lost[0]}, are not at the DVC remote "
                f"{remote or '(the default)'}; whoever has them runs `dvc push`; or name another remote."
            )
        fetch(lacking, remote)
        tried |= {out["md5"] for out in lacking}  # scores may then show that questions lack as well
    changes = _compared(names, at, tensors)
    if not tensors:  # then no model is read
        for gap in changes["missing"]:
            gap["outputs"] = [out for out in gap["outputs"] if not _is_model(out)]
        changes["missing"] = [gap for gap in changes["missing"] if gap["outputs"]]
    for gap in changes["missing"]:
        models = [_is_model(out) for out in gap["outputs"]]
        fetches = [*([Fetched.all] if any(models) else []), *([] if all(models) else [Fetched.results])]
        gap["commands"] = [_command(names, at, fetched) for fetched in reversed(fetches)]
    return changes


def _compared(names: Sequence[str], at: str | None, tensors: bool = True) -> dict[str, Any]:
    from flows.changes.diff import diff_candidates, diff_revisions  # pandas and scipy take a second

    if revision := _of_candidates(names, at):
        return diff_candidates(revision, list(dict.fromkeys(names)), tensors)
    if len(names) > 2:
        raise Refusal(f"{len(names)} revisions are given; compare two: prunequant diff {' '.join(names[:2])}")
    old, new = (read_revision(name) for name in (names[0], names[1] if len(names) == 2 else None))
    return diff_revisions(old, new, tensors)


def _of_candidates(names: Sequence[str], at: str | None) -> Revision | None:
    """Return the revision whose candidates are named; None if the names are revisions."""
    stages = ("base", *RECIPES)
    if at is None and not any(name.partition("/")[0] in stages for name in names):
        return None  # the workspace's params.yaml may be half edited
    if at is None and not Path("params.yaml").exists():
        return None
    revision = read_revision(at)
    known = _models(revision.params)
    candidates = [name for name in names if name in known]
    if at is None and not candidates:
        lost = [name for name in names if name.partition("/")[0] in stages and not is_revision(name)]
        if not lost:
            return None
        raise Refusal(f"{lost[0]!r} is neither a candidate nor a revision; {allowed(known, lost[0])}.")
    if at is None and (both := [name for name in candidates if is_revision(name)]):
        raise Refusal(
            f"{both[0]!r} names a candidate and a git revision; write refs/heads/{both[0]} for the branch, "
            f"or add --at {WORKSPACE} for the candidate."
        )
    if others := [name for name in names if name not in known]:
        if at is None and is_revision(others[0]):
            raise Refusal(
                f"{others[0]!r} is a revision and {candidates[0]!r} a candidate; give revisions alone, or "
                f"candidates of one: prunequant diff CANDIDATE CANDIDATE --at {others[0]}"
            )
        raise Refusal(f"{others[0]!r} is no candidate of {revision.name}; {allowed(known, others[0])}.")
    if len(set(names)) < 2:
        given = "alone" if len(names) == 1 else "with itself"
        raise Refusal(f"{names[0]!r} is given {given}; name another candidate to compare, such as its base.")
    return revision


def _models(params: dict[str, Any]) -> list[str]:
    """Return every model that params.yaml names, as `<stage>/<recipe>`."""
    recipes = [f"{stage}/{name}" for stage in RECIPES if stage != "teach" for name in params.get(stage, {})]
    return [*(f"base/{name}" for name in params.get("models", {})), *recipes]


def _is_model(out: dict[str, Any]) -> bool:
    return Path(out["path"]).is_relative_to(MODELS)


def _lacking(changes: dict[str, Any], fetched: Fetched) -> list[dict[str, Any]]:
    """Return the outputs that the cache lacks, of those that may be fetched."""
    outs = [out for gap in changes["missing"] for out in gap["outputs"]]
    return [out for out in outs if fetched is Fetched.all or not _is_model(out)]


def _command(names: Sequence[str], at: str | None, fetched: Fetched) -> str:
    words = ["prunequant", "diff", *names, *(["--at", at] if at else []), "--fetch", fetched.value]
    return shlex.join(words)

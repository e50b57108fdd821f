"""What changed, and which stages and artifacts that made again.

Read from both sides' dvc.lock, which has the params and the hashes of inputs that each stage ran with. A
cause is a param, the code of a method, or a file that no stage makes (requirements.lock).
"""

from collections.abc import Iterator
from typing import Any

import networkx

from flows.changes.revisions import Revision
from stages.core.files import DATASETS, MODELS
from stages.core.schema import RECIPES

_APART = ("code", "validate")
"""Stages that all others wait for; what they write is a cause of its own or never changes."""
_CODE = "data/code/"
_RECORDS = "data/provenance/"


def param_changes(old: Any, new: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """Yield the leaves that differ, by dotted key, None where a side has no such key."""
    if isinstance(old, dict) or isinstance(new, dict):
        old, new = (
            side if isinstance(side, dict) else {} if side is None else {"": side} for side in (old, new)
        )
        for name in dict.fromkeys([*old, *new]):
            yield from param_changes(old.get(name), new.get(name), f"{key}.{name}".strip("."))
    elif old != new:
        yield {"key": key, "old": old, "new": new}


def causes(old: Revision, new: Revision) -> list[dict[str, Any]]:
    """Return what changed, with what it caused.

    Returns:
        Rows of `kind` (param, code or file), `cause`, `stages` that depend on it, `then` the stages made
        again after those, `artifacts`, the outputs of both that differ, and `waiting`, stages of the new
        side that have not run with the new param, or not at all.
    """
    stages = [_stages(side) for side in (old, new)]
    direct: dict[tuple[str, str], dict[str, None]] = {}
    outputs = {
        out["path"] for side in (old, new) for entry in side.stages.values() for out in entry.get("outs", [])
    }
    for name in stages[0].keys() & stages[1].keys():
        for root in _roots(stages[0][name], stages[1][name], outputs):
            direct.setdefault(root, {})[name] = None
    waiting: dict[str, list[str]] = {}
    unmade = _unmade(new)
    for change in param_changes(old.params, new.params):
        direct.setdefault(("param", change["key"]), {})
        waiting[change["key"]] = [
            *(name for name, entry in stages[1].items() if _is_waiting(entry, change["key"], new.params)),
            *(name for name, recipe in unmade.items() if f"{change['key']}.".startswith(f"{recipe}.")),
        ]
    graph, outs = _graph({**stages[0], **stages[1]}), _changed_outs(old, new)
    rows = []
    for (kind, cause), names in sorted(direct.items()):
        after = {later for name in names for later in networkx.descendants(graph, name)} - names.keys()
        then = sorted(name for name in after if outs.get(name))
        artifacts = sorted({out for name in (*names, *then) for out in outs.get(name, ())})
        rows.append(
            {"kind": kind, "cause": cause, "stages": sorted(names), "then": then, "artifacts": artifacts}
            | {"waiting": sorted(waiting.get(cause, ())) if kind == "param" else []}
        )
    return rows


def _stages(side: Revision) -> dict[str, dict[str, Any]]:
    """Return the entries of dvc.lock whose results params.yaml still names."""
    return {
        name: entry
        for name, entry in side.stages.items()
        if name not in _APART and any(out["path"] in side.outs for out in entry.get("outs", []))
    }


def _roots(old: dict[str, Any], new: dict[str, Any], outputs: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the params, code and files that differ between two entries of a stage."""
    was, now = _params(old), _params(new)
    for key in dict.fromkeys([*was, *now]):
        for change in param_changes(was.get(key), now.get(key), key):
            yield "param", change["key"]
    hashes = [{dep["path"]: dep.get("md5") for dep in entry.get("deps", [])} for entry in (old, new)]
    for path in dict.fromkeys([*hashes[0], *hashes[1]]):
        if hashes[0].get(path) != hashes[1].get(path):
            if path.startswith(_CODE):
                yield "code", path.removeprefix(_CODE)
            elif path not in outputs and not any(_touch(path, out) for out in outputs):
                yield "file", path


def _params(entry: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = entry.get("params", {}).get("params.yaml", {})
    return params


def _is_waiting(entry: dict[str, Any], key: str, params: dict[str, Any]) -> bool:
    """Tell whether a stage depends on a param and ran with another value than params.yaml has now."""
    for name, value in _params(entry).items():
        if key == name or key.startswith(f"{name}."):
            now: Any = params
            for part in name.split("."):
                now = now.get(part) if isinstance(now, dict) else None
            return bool(now != value)
    return False


def _unmade(side: Revision) -> dict[str, str]:
    """Return the stages of recipes whose output dvc.lock lacks, each with its recipe's key."""
    return {
        f"{stage}@{name}": f"{stage}.{name}"
        for stage in RECIPES
        for name in side.params.get(stage, {})
        if str(DATASETS / name if stage == "teach" else MODELS / stage / name) not in side.outs
    }


def _graph(stages: dict[str, dict[str, Any]]) -> networkx.DiGraph:
    """Return the graph of stages, from what makes an output to what depends on it."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(stages)
    outs = [(out["path"], name) for name, entry in stages.items() for out in entry.get("outs", [])]
    exact = dict(outs)
    for name, entry in stages.items():
        for dep in (dep["path"] for dep in entry.get("deps", [])):
            if dep in exact:
                graph.add_edge(exact[dep], name)
            else:
                graph.add_edges_from((maker, name) for out, maker in outs if out.startswith(f"{dep}/"))
    return graph


def _touch(path: str, out: str) -> bool:
    return path.startswith(f"{out}/") or out.startswith(f"{path}/")


def _changed_outs(old: Revision, new: Revision) -> dict[str, list[str]]:
    """Return the outputs of each stage that differ, without the records of their inputs."""
    changed: dict[str, list[str]] = {}
    for name in {**old.stages, **new.stages}:
        paths = {out["path"] for side in (old, new) for out in side.stages.get(name, {}).get("outs", [])}
        changed[name] = sorted(
            path for path in paths if old.hash(path) != new.hash(path) and not path.startswith(_RECORDS)
        )
    return changed

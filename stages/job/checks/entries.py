"""The raw file, some of whose entries may be wrong: who descends from whom, and its sound entries."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stages.job.params import SUITES
from stages.job.sentences import allowed

SOURCED = ("prune", "quantize", "teach", "finetune", "noise", "floor")


def sound(raw: Mapping[str, Any], locations: Iterable[tuple[Any, ...]]) -> tuple[dict[str, Any], set[str]]:
    """`raw` without the entries at error `locations`, and which data sets those were."""
    kept: dict[str, Any] = {
        # A name that is no string, such as YAML's true, is told of by its section's error.
        key: {name: entry for name, entry in value.items() if isinstance(name, str)}
        if isinstance(value, dict)
        else value
        for key, value in raw.items()
    }
    kinds = kept.get("suites")
    kept["suites"] = {
        kind: dict(found) if isinstance(found := (kinds or {}).get(kind), dict) else {}
        for kind in (SUITES if isinstance(kinds, dict) else ())
    } or {kind: {} for kind in SUITES}
    broken: set[str] = set()
    for section, *rest in locations:
        if section == "run":
            kept["run"] = {"device": "auto", "dtype": "float32", "threads": 1, "seed": 0}
        elif section == "evaluate":
            kept["evaluate"] = {"candidates": ("base/none",)}
        elif section == "profile":
            kept["profile"] = {
                "candidates": (), "batch_sizes": (1,), "prompt_tokens": 1, "new_tokens": 2, "warmup": 1,
                "repeats": 3, "threads": 1,
            }  # fmt: skip
        elif section == "suites":
            if len(rest) > 1 and rest[0] in SUITES:
                kept["suites"][rest[0]] = _without(kept["suites"][rest[0]], rest[1])
        elif rest and isinstance(kept.get(section), dict):
            kept[section] = _without(kept[section], rest[0])
            broken |= {str(rest[0])} if section in ("datasets", "teach") else set()
        elif section in (*SOURCED, "models", "datasets"):
            kept[section] = {}
        else:
            kept.pop(section, None)
    return kept, broken


def _without(entries: dict[Any, Any], name: Any) -> dict[Any, Any]:
    return {key: value for key, value in entries.items() if str(key) != str(name)}


def of_lineage(raw: Mapping[str, Any]) -> Iterator[str]:
    """Sources that are not there, cycles, and candidates that are not there, listed twice or uncompared."""

    def entries(section: str) -> dict[str, Any]:
        found = raw.get(section)
        return found if isinstance(found, dict) else {}

    known = [f"base/{name}" for name in entries("models")]
    sources: dict[str, str] = {}
    for stage in SOURCED:
        for name, recipe in entries(stage).items():
            if stage != "teach":  # makes a data set
                known.append(f"{stage}/{name}")
            if isinstance(recipe, dict) and isinstance(recipe.get("source"), str):
                sources[f"{stage}/{name}"] = recipe["source"]
    for artifact, source in sources.items():
        at = artifact.replace("/", ".", 1)
        if source not in known:
            others = [
                name for name in known if name != artifact and not name.startswith(("noise/", "floor/"))
            ]
            yield f"{at}.source: there is no {source!r}; {allowed(others, source)}."
            continue
        trail = [artifact]
        while source in sources and source not in trail:
            trail.append(source)
            source = sources[source]
        if source == artifact:
            yield f"{at}.source: a cycle, {' <- '.join([*trail, artifact])}; one must start from base/."
    for section in ("evaluate", "profile"):
        candidates = entries(section).get("candidates")
        listed = (
            [name for name in candidates if isinstance(name, str)] if isinstance(candidates, list) else []
        )
        for candidate in listed:
            if candidate not in known:
                yield f"{section}.candidates: there is no {candidate!r}; {allowed(known, candidate)}."
            if listed.count(candidate) > 1:
                yield f"{section}.candidates: {candidate} is listed twice; list it once."
        if section == "evaluate" and listed and all(n.startswith(("noise/", "floor/")) for n in listed):
            yield (
                f"{section}.candidates: there is no model to compare, as noise/ and floor/ only tell what "
                f"scores mean; add one, such as {known[0] if known else 'a base'}."
            )

"""The raw file, some of whose entries may be wrong: its sound entries, and the lineage of all of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stages.core.schema import CONTROLS, RECIPES
from stages.job.params import SUITES
from stages.job.sentences import allowed

_SUITES = (*SUITES, "datasets")
"""What section `suites` holds."""
PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "run": {"device": "auto", "dtype": "float32", "threads": 1, "seed": 0, "numerics": "fast"},
    "evaluate": {"candidates": ("base/none",)},
    "profile": {
        "candidates": (), "batch_sizes": (1,), "prompt_tokens": 1, "new_tokens": 2, "warmup": 1, "repeats": 3,
        "threads": 1,
    },
    "report": {"margin": 0.02},
}  # fmt: skip
"""Sound sections in place of broken ones, so that the rest of the file can be checked."""


def sound(raw: Mapping[str, Any], locations: Iterable[tuple[Any, ...]]) -> tuple[dict[str, Any], set[str]]:
    """Return `raw` without the entries at error `locations`, and the names of the data sets among these."""
    kept: dict[str, Any] = {
        # A name that is no string, such as YAML's true, is reported with its section.
        key: {name: entry for name, entry in value.items() if isinstance(name, str)}
        if isinstance(value, dict)
        else value
        for key, value in raw.items()
    }
    suites = kept.get("suites")
    by_kind = suites if isinstance(suites, dict) else {}
    kept["suites"] = {
        kind: dict(entries) if isinstance(entries := by_kind.get(kind), dict) else {} for kind in _SUITES
    }
    broken: set[str] = set()
    for section, *rest in locations:
        if section in PLACEHOLDERS:
            kept[section] = PLACEHOLDERS[section]
        elif section == "suites":
            if len(rest) > 1 and rest[0] in _SUITES:
                kept["suites"][rest[0]] = _without(kept["suites"][rest[0]], rest[1])
        elif section == "studies" and rest[1:2] == ["hypotheses"] and len(rest) > 2:
            kept["studies"] = _without_hypothesis(kept["studies"], rest[0], rest[2])
        elif rest and isinstance(kept.get(section), dict):
            kept[section] = _without(kept[section], rest[0])
            broken |= {str(rest[0])} if section in ("datasets", "teach") else set()
        elif section in (*RECIPES, "models", "datasets", "studies"):
            kept[section] = {}
        else:
            kept.pop(section, None)
    return kept, broken


def _without(entries: dict[Any, Any], name: Any) -> dict[Any, Any]:
    return {key: value for key, value in entries.items() if str(key) != str(name)}


def _without_hypothesis(studies: dict[Any, Any], study: Any, name: Any) -> dict[Any, Any]:
    """Return the studies without a hypothesis, and without its study if none is left."""
    if str(study) not in studies:
        return studies
    entry = studies[study]
    left = _without(entry["hypotheses"], name)
    return {**studies, study: {**entry, "hypotheses": left}} if left else _without(studies, study)


def of_lineage(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield sources and candidates that do not exist, cycles, candidates listed twice or without a model."""

    def entries(section: str) -> dict[str, Any]:
        value = raw.get(section)
        return value if isinstance(value, dict) else {}

    known = [f"base/{name}" for name in entries("models")]
    sources: dict[str, str] = {}
    for stage in RECIPES:
        for name, recipe in entries(stage).items():
            if stage != "teach":  # which makes a data set
                known.append(f"{stage}/{name}")
            if isinstance(recipe, dict) and isinstance(recipe.get("source"), str):
                sources[f"{stage}/{name}"] = recipe["source"]
    yield from _of_sources(known, sources)
    for section in ("evaluate", "profile"):
        candidates = entries(section).get("candidates")
        listed = [c for c in candidates if isinstance(c, str)] if isinstance(candidates, list) else []
        yield from _of_candidates(section, known, listed)


def _of_sources(known: list[str], sources: Mapping[str, str]) -> Iterator[str]:
    for artifact, source in sources.items():
        at = artifact.replace("/", ".", 1)
        if source not in known:
            others = [name for name in known if name != artifact and not name.startswith(CONTROLS)]
            yield f"{at}.source: there is no {source!r}; {allowed(others, source)}."
            continue
        trail, ancestor = [artifact], source
        while ancestor in sources and ancestor not in trail:
            trail.append(ancestor)
            ancestor = sources[ancestor]
        if ancestor == artifact:
            yield f"{at}.source: a cycle, {' <- '.join([*trail, artifact])}; start from a model of base/."


def _of_candidates(section: str, known: list[str], listed: list[str]) -> Iterator[str]:
    for candidate in listed:
        if candidate not in known:
            yield f"{section}.candidates: there is no {candidate!r}; {allowed(known, candidate)}."
        if listed.count(candidate) > 1:
            yield f"{section}.candidates: {candidate} is listed twice; list it once."
    if section == "evaluate" and listed and all(name.startswith(CONTROLS) for name in listed):
        yield (
            f"{section}.candidates: there is no model to compare, as noise/ and floor/ only say what scores "
            f"mean; add a model, such as {known[0] if known else 'a base'}."
        )

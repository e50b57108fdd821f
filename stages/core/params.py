"""The whole of `params.yaml` as one strict schema, and every reason to refuse it, told at once.

A method is its config class: the unions below are the registry, so a misspelt method is answered with
the legal ones. This file names every method and therefore is no dependency of any stage in `dvc.yaml`:
adding a method must not make old recipes run again.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, ValidationError

from stages.core.calibration import Calibration
from stages.core.errors import Refusal
from stages.core.run import Run
from stages.core.schema import Candidate, Recipe, Slug, Source, Strict
from stages.download.arithmetic import Arithmetic
from stages.download.benchmark import Benchmark
from stages.download.gguf import Gguf
from stages.download.safetensors import Safetensors
from stages.download.text import Text
from stages.evaluate.benchmark import BenchmarkSuite
from stages.evaluate.graded import GradedSuite
from stages.evaluate.perplexity import PerplexitySuite
from stages.finetune.lora import LoRA
from stages.prune.magnitude import Magnitude
from stages.prune.wanda import Wanda
from stages.quantize.gptq import GPTQ
from stages.quantize.rtn import RTN

PARAMS = Path("params.yaml")

Model = Annotated[Gguf | Safetensors, Field(discriminator="format")]
Dataset = Annotated[Text | Arithmetic | Benchmark, Field(discriminator="kind")]
Prune = Annotated[Magnitude | Wanda, Field(discriminator="method")]
Quantize = Annotated[RTN | GPTQ, Field(discriminator="method")]
# A union of one is no union to pydantic; the next method turns this into one like those above.
Finetune = LoRA


class Noise(Strict):
    """A candidate that is its source again, evaluated at another batch size."""

    source: Source
    batch_size: Annotated[int, Field(ge=1)]


class Suites(Strict):
    """What candidates are asked, by kind. A suite scores the data set of its own name."""

    perplexity: dict[Slug, PerplexitySuite]
    graded: dict[Slug, GradedSuite]
    benchmark: dict[Slug, BenchmarkSuite]

    def by_name(self) -> dict[str, PerplexitySuite | GradedSuite | BenchmarkSuite]:
        """Every suite of every kind."""
        return {**self.perplexity, **self.graded, **self.benchmark}


class Evaluate(Strict):
    """Which models every suite is asked of."""

    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]


class Params(Strict):
    """All of params.yaml."""

    run: Run
    models: dict[Slug, Model]
    datasets: dict[Slug, Dataset]
    prune: dict[Slug, Prune]
    quantize: dict[Slug, Quantize]
    finetune: dict[Slug, Finetune]
    noise: dict[Slug, Noise]
    suites: Suites
    evaluate: Evaluate

    def recipes(self) -> dict[str, Recipe | Noise]:
        """Every recipe that has a source, as `<stage>/<recipe>`."""
        stages: dict[str, Mapping[str, Recipe | Noise]] = {
            "prune": self.prune,
            "quantize": self.quantize,
            "finetune": self.finetune,
            "noise": self.noise,
        }
        return {
            f"{stage}/{name}": recipe for stage, found in stages.items() for name, recipe in found.items()
        }

    def evaluations(self) -> list[str]:
        """Every `<candidate>/<suite>` there is a result of."""
        return [
            f"{candidate}/{suite}"
            for candidate in self.evaluate.candidates
            for suite in self.suites.by_name()
        ]

    def base_of(self, artifact: str) -> str | None:
        """The model an artifact descends from; None where a source is missing or its lineage is a cycle."""
        recipes, seen = self.recipes(), set[str]()
        while not artifact.startswith("base/"):
            if artifact in seen or artifact not in recipes:
                return None
            seen.add(artifact)
            artifact = recipes[artifact].source
        return artifact.removeprefix("base/") if artifact.removeprefix("base/") in self.models else None


def load(path: Path = PARAMS) -> Params:
    """Read and check `path`.

    Raises:
        Refusal: one line an offender, all of them.
    """
    if not path.exists():
        raise Refusal(f"there is no {path} here; run from the root of a prunequant project.")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise Refusal(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise Refusal(
            f"{path} must hold sections ({', '.join(Params.model_fields)}), it holds {type(raw).__name__}."
        )
    return validate(raw, str(path))


def validate(raw: dict[str, Any], where: str = "params.yaml") -> Params:
    """`Params` from parsed YAML.

    Raises:
        Refusal: one line an offender, all of them.
    """
    offenders: list[str] = []
    try:
        params = Params.model_validate(_tuples(raw), strict=True)
    except ValidationError as error:
        offenders = [_sentence(details, raw) for details in error.errors()]
        params = None
    # What is wrong between recipes is told even where single fields are wrong too.
    offenders += params_problems(params) if params else raw_problems(raw)
    if offenders:
        lines = "\n".join(f"  - {line}" for line in dict.fromkeys(offenders))
        raise Refusal(f"{where} has {len(set(offenders))} problem(s), nothing was run:\n{lines}")
    assert params is not None
    return params


def _tuples(value: Any) -> Any:
    """YAML's lists as tuples, which is what the strict, frozen schema holds."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def raw_problems(raw: dict[str, Any]) -> Iterator[str]:
    """Problems between recipes of a file whose fields do not all validate: missing sources and cycles."""
    sources: dict[str, str] = {}
    for stage in ("prune", "quantize", "finetune", "noise"):
        section = raw.get(stage)
        for name, recipe in (section if isinstance(section, dict) else {}).items():
            source = recipe.get("source") if isinstance(recipe, dict) else None
            sources[f"{stage}/{name}"] = source if isinstance(source, str) else ""
    models = raw.get("models")
    bases = [f"base/{name}" for name in (models if isinstance(models, dict) else {})]
    yield from _lineage_problems(bases, {name: source for name, source in sources.items() if source})
    evaluate = raw.get("evaluate")
    candidates = evaluate.get("candidates") if isinstance(evaluate, dict) else None
    if isinstance(candidates, list):
        known = [*bases, *sources]
        yield from _candidate_problems([c for c in candidates if isinstance(c, str)], known)


def params_problems(params: Params) -> Iterator[str]:
    """Everything wrong between the parts of params that are each well-formed."""
    recipes = params.recipes()
    bases = [f"base/{name}" for name in params.models]
    yield from _lineage_problems(bases, {name: recipe.source for name, recipe in recipes.items()})
    yield from _candidate_problems(list(params.evaluate.candidates), [*bases, *recipes])

    texts = {name for name, dataset in params.datasets.items() if isinstance(dataset, Text)}
    if "none" in params.datasets:
        yield "datasets.none: the name none is taken, it stands for no data; rename it."
    for artifact, recipe in recipes.items():
        at = artifact.replace("/", ".")
        for field in ("calibration", "train"):
            wanted = getattr(recipe, field, None)
            if isinstance(wanted, Calibration):
                dataset = params.datasets.get(wanted.dataset)
                if not isinstance(dataset, Text):
                    yield f"{at}.{field}.dataset: {wanted.dataset!r} is no text data set; {_allowed(texts)}."
                elif not dataset.calibration:
                    yield (
                        f"{at}.{field}.dataset: {wanted.dataset} keeps all its text for evaluation; set "
                        f"datasets.{wanted.dataset}.calibration to the share that may be learned from."
                    )
        size, base = getattr(recipe, "group_size", None), params.base_of(artifact)
        if size and base:
            uneven = [width for width in params.models[base].in_features if width % size]
            if uneven:
                widths = params.models[base].in_features
                fitting = [n for n in range(8, min(widths) + 1) if not any(width % n for width in widths)]
                yield (
                    f"{at}.group_size: {size} does not divide the input width(s) "
                    f"{', '.join(map(str, uneven))} of {base}; allowed: {', '.join(map(str, fitting))} or null."
                )

    kinds = {"perplexity": Text, "graded": Arithmetic, "benchmark": Benchmark}
    names: list[str] = []
    for kind, dataset_class in kinds.items():
        for suite in getattr(params.suites, kind):
            names.append(suite)
            if not isinstance(params.datasets.get(suite), dataset_class):
                fitting = [
                    name for name, dataset in params.datasets.items() if isinstance(dataset, dataset_class)
                ]
                yield (
                    f"suites.{kind}.{suite}: a suite scores the data set of its own name, and datasets has no "
                    f"{suite!r} of kind {_tag(dataset_class)}; {_allowed(fitting)}."
                )
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"suites: {name} is named under two kinds; a name is one suite."

    for section, entries in (("models", params.models), ("datasets", params.datasets)):
        for name, entry in entries.items():  # type: ignore[attr-defined]
            source = getattr(entry, "source", "")
            if source.startswith("path:"):
                if getattr(entry, "sha256", None) is None:
                    yield f"{section}.{name}.sha256: needed for a path: source, so that a change is seen."
                if not Path(source.removeprefix("path:")).exists():
                    yield f"{section}.{name}.source: {source} does not exist."
    if params.run.device != "auto":
        try:
            params.run.resolved_device()
        except Refusal as refusal:
            yield str(refusal)


def _lineage_problems(bases: list[str], sources: Mapping[str, str]) -> Iterator[str]:
    known = [*bases, *sources]
    for name, source in sources.items():
        at = name.replace("/", ".", 1)
        if source not in known:
            yield f"{at}.source: there is no {source!r}; {_allowed(known, source)}."
            continue
        trail = [name]
        while source in sources and source not in trail:
            trail.append(source)
            source = sources[source]
        if source == name:
            yield f"{at}.source: a cycle, {' <- '.join([*trail, name])}; one of them must start from base/."


def _candidate_problems(candidates: list[str], known: list[str]) -> Iterator[str]:
    for candidate in candidates:
        if candidate not in known:
            yield f"evaluate.candidates: there is no {candidate!r}; {_allowed(known, candidate)}."
        if candidates.count(candidate) > 1:
            yield f"evaluate.candidates: {candidate} is listed twice; list it once."


def _allowed(known: Any, given: str | None = None) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(given, names, 1) if given else []
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(names) or 'none'}"


def _tag(dataset_class: type[Strict]) -> str:
    return str(get_args(dataset_class.model_fields["kind"].annotation)[0])


CLASSES: dict[str, tuple[type[Strict], ...]] = {
    "models": (Gguf, Safetensors),
    "datasets": (Text, Arithmetic, Benchmark),
    "prune": get_args(get_args(Prune)[0]),
    "quantize": get_args(get_args(Quantize)[0]),
    "finetune": (LoRA,),
    "noise": (Noise,),
    "run": (Run,),
    "evaluate": (Evaluate,),
    "suites": (Suites,),
}
"""The classes that may stand in each section; the contract test over methods reads them here too."""


def methods(section: str) -> dict[str, type[Any]]:
    """The config classes of a section that have a method, by its name."""
    return {str(get_args(c.model_fields["method"].annotation)[0]): c for c in CLASSES[section]}


def _sentence(details: Any, raw: Any) -> str:
    """One of pydantic's errors as: where, what was given, what is allowed."""
    kind, given = details["type"], details["input"]
    words = [str(part) for part in details["loc"]]
    at = ".".join(word for word in words if word != "[key]")
    shown = repr(given) if not isinstance(given, dict) else "a section"
    if kind == "extra_forbidden":
        fields = _fields_beside(details["loc"])
        return f"{at}: no such field; {_allowed(fields, words[-1])}."
    if kind == "union_tag_invalid":
        tag = details["ctx"]["tag"]
        known = details["ctx"]["expected_tags"].replace("'", "").split(", ")
        return (
            f"{at}.{details['ctx']['discriminator'].strip(chr(39))}: {tag!r} given; {_allowed(known, tag)}."
        )
    if kind == "union_tag_not_found":
        field = details["ctx"]["discriminator"].strip("'")
        return f"{at}: needs the field {field}; {_allowed(_tags(words[0], field))}."
    if kind == "missing":
        return f"{at}: this field is missing."
    if words[-1] == "[key]":
        return f"{at}: bad name {shown}; {_plain(details)}."
    return f"{at}: {shown} given; {_plain(details)}."


def _plain(details: Any) -> str:
    message = str(details["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _tags(section: str, field: str) -> list[str]:
    return [str(get_args(c.model_fields[field].annotation)[0]) for c in CLASSES.get(section, ())]


def _fields_beside(loc: tuple[Any, ...]) -> list[str]:
    """The legal fields at the place of an unknown one."""
    if len(loc) == 1:
        return list(Params.model_fields)
    for candidate in CLASSES.get(str(loc[0]), ()):
        tags = [get_args(field.annotation) for field in candidate.model_fields.values()]
        if len(CLASSES[str(loc[0])]) > 1 and not any(loc[2] in tag for tag in tags if len(loc) > 2):
            continue
        inner: Any = candidate
        for part in loc[:-1]:
            field = getattr(inner, "model_fields", {}).get(part)
            if field is None:
                continue
            found = [a for a in (field.annotation, *get_args(field.annotation)) if hasattr(a, "model_fields")]
            found += [
                b for a in get_args(field.annotation) for b in get_args(a) if hasattr(b, "model_fields")
            ]
            inner = found[0] if found else inner
        return list(inner.model_fields)
    return []

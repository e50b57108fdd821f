"""What each stage function is given of params, and what each stage reads.

A stage function takes its own pieces, `prune(recipe, run, name)`; only here and in `stages.job.entry` are
params known as a whole. An artifact therefore depends on its recipe and the `run` section and on nothing else
in params.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.job import lineage
from stages.job.params import REGISTRY, SUITES, Params
from stages.job.sentences import tag
from stages.reporting.scope import Scope
from stages.sources.mix import Mix
from stages.sources.text import Text

RUN = ("run.dtype", "run.numerics", "run.seed", "run.threads")
"""The settings of the run that change results."""


@dataclass(frozen=True)
class Pieces:
    """How a stage is called for one of its recipes."""

    arguments: Callable[[Params, str], tuple[Any, ...]]
    """(params, recipe) -> the arguments of the stage function."""
    recipes: Callable[[Params], list[str]] | None = None
    """The names a stage can be called with; None for a stage that takes none."""
    settings: Callable[[Params, str], Any] | None = None
    """(params, recipe) -> the settings whose class picks the method; None for a stage without methods."""
    models: Callable[[Params, str], list[str]] = lambda params, name: []
    """(params, recipe) -> the models it reads, `<stage>/<recipe>`."""
    datasets: Callable[[Params, str], list[str]] = lambda params, name: []
    """(params, recipe) -> the data sets it reads."""
    keys: Callable[[Params, str], list[str]] = lambda params, name: []
    """(params, recipe) -> the dotted keys of params.yaml that its result depends on, as in dvc.yaml."""
    computes: bool = False
    """Whether it computes with a model, on `run.device` and with `run.threads`."""


def _section(stage: str, *, methods: bool = True) -> Pieces:
    """Return the pieces of a stage whose section of params has the stage's name.

    Args:
        methods: whether the section is a union of methods; if not, the stage copies and computes nothing, so
            it needs no settings of the run.
    """
    return Pieces(
        arguments=lambda params, name: (
            getattr(params, stage)[name],
            *([params.run] if methods else []),
            name,
        ),
        recipes=lambda params: list(getattr(params, stage)),
        settings=(lambda params, name: getattr(params, stage)[name]) if methods else None,
        models=lambda params, name: [getattr(params, stage)[name].source],
        datasets=lambda params, name: lineage.datasets_of(params, f"{stage}/{name}"),
        keys=lambda params, name: [f"{stage}.{name}", *(RUN if methods else ())],
        computes=methods,
    )


def _origin(params: Params, name: str) -> Any:
    kind, key = name.split("/")
    return (params.models if kind == "base" else params.datasets)[key]


def _origin_keys(params: Params, name: str) -> list[str]:
    kind, key = name.split("/")
    return [f"models.{key}", *RUN] if kind == "base" else [f"datasets.{key}"]


def _suite(params: Params, name: str) -> Any:
    return params.suites.by_name()[name.rpartition("/")[2]]


def _suite_keys(params: Params, name: str) -> list[str]:
    suite = name.rpartition("/")[2]
    kind = next(kind for kind in SUITES if suite in getattr(params.suites, kind))
    return [f"suites.{kind}.{suite}", *RUN]


STAGES: dict[str, Pieces] = {
    "code": Pieces(lambda params, name: (identified(),)),
    "validate": Pieces(lambda params, name: ()),
    "download": Pieces(
        arguments=lambda params, name: (_origin(params, name), params.run, name),
        recipes=lambda params: [
            *(f"base/{key}" for key in params.models), *(f"datasets/{key}" for key in params.datasets)
        ],
        settings=_origin,
        keys=_origin_keys,
    ),
    "alias": Pieces(
        arguments=lambda params, name: (params.suites.datasets[name], name),
        recipes=lambda params: list(params.suites.datasets),
        datasets=lambda params, name: [params.suites.datasets[name]],
        keys=lambda params, name: [f"suites.datasets.{name}"],
    ),
    "prune": _section("prune"),
    "quantize": _section("quantize"),
    "teach": _section("teach"),
    "finetune": _section("finetune"),
    "noise": _section("noise", methods=False),
    "floor": _section("floor", methods=False),
    "evaluate": Pieces(
        arguments=lambda params, name: (_suite(params, name), params.run, name),
        recipes=Params.evaluations,
        settings=_suite,
        models=lambda params, name: [name.rpartition("/")[0]],
        datasets=lambda params, name: [name.rpartition("/")[2]],
        keys=_suite_keys,
        computes=True,
    ),
    "profile": Pieces(
        arguments=lambda params, name: (params.profile, params.run, name),
        recipes=lambda params: list(params.profile.candidates),
        models=lambda params, name: [name],
        keys=lambda params, name: [
            "profile.batch_sizes", "profile.new_tokens", "profile.prompt_tokens", "profile.repeats",
            "profile.threads", "profile.warmup", "run.dtype", "run.numerics", "run.seed",
        ],
        computes=True,
    ),
    "tidy": Pieces(
        arguments=lambda params, name: (params.evaluations(), params.profile.candidates),
        keys=lambda params, name: ["evaluate.candidates", "profile.candidates", "suites"],
    ),
    "report": Pieces(
        arguments=lambda params, name: (scope(params),),
        keys=lambda params, name: list(Params.model_fields),
    ),
}  # fmt: skip
"""By the stage's name, which is that of its file in `stages/`."""


def dvc_name(stage: str, params: Params, recipe: str) -> str:
    """Return what DVC calls a stage's recipe, as dvc.yaml has it, such as prune@wanda-50."""
    if stage == "evaluate":
        candidate, _, suite = recipe.rpartition("/")
        kind = next(kind for kind, suites in params.suites.by_kind().items() if suite in suites)
        return f"{kind}@{candidate}-{suite}"
    section, _, key = recipe.rpartition("/")
    group = {"base": "model", "datasets": "dataset"}.get(section) if stage == "download" else None
    return f"{group}@{key}" if group else f"{stage}@{recipe}"


def scope(params: Params) -> Scope:
    """Return what the report compares."""
    return Scope(
        evaluations=tuple(params.evaluations()),
        candidates=params.evaluate.candidates,
        suites=tuple(params.suites.by_name()),
        datasets=params.suites.datasets,
        profiled=params.profile.candidates,
        models=params.models,
        recipes=params.recipes(),
        report=params.report,
        studies=params.studies,
        mixed={
            mix: [
                name
                for name, text in params.datasets.items()
                if isinstance(text, Text) and text.sha256 in {part.sha256 for part in dataset.parts.values()}
            ]
            for mix, dataset in params.datasets.items()
            if isinstance(dataset, Mix)
        },
    )


def identified() -> list[tuple[str, str, str | None]]:
    """Return every (stage, method, module of the method) with a code identity.

    The method of a stage without methods is `all`, and has no module.
    """
    identities: list[tuple[str, str, str | None]] = []
    for section, classes in REGISTRY.items():
        stage = "download" if section in ("models", "datasets") else section
        identities += [(stage, tag(config), config.__module__) for config in classes]
    identities += [("evaluate", kind, config.__module__) for kind, config in SUITES.items()]
    identities += [
        (stage, "all", None)
        for stage, pieces in STAGES.items()
        if pieces.settings is None and stage != "code"
    ]
    return identities


def method_of(stage: str, params: Params, recipe: str) -> tuple[str, str | None]:
    """Return the method of a stage's recipe and the method's module, as `identified` lists them."""
    settings = STAGES[stage].settings
    if settings is None:
        return "all", None
    module = type(settings(params, recipe)).__module__
    return next((method, file) for name, method, file in identified() if (name, file) == (stage, module))

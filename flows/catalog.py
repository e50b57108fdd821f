"""What params.yaml may name, and what it names: a line each, in the words of the schema.

The line of a method is the first line of its class's docstring.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from stages.core.errors import Refusal
from stages.core.files import DATASETS, MODELS, RESULTS
from stages.core.schema import Strict
from stages.job.params import REGISTRY, SUITES, Params
from stages.job.sentences import allowed, tag


def known_methods(section: str | None = None) -> list[dict[str, Any]]:
    """Return a row a method, format or kind: `section`, `name`, `does`.

    Args:
        section: of params.yaml; None: all.

    Raises:
        Refusal: the section has no methods.
    """
    rows = [
        {"section": name, "name": tag(config), "does": _line(config)}
        for name, classes in REGISTRY.items()
        for config in classes
    ]
    rows += [{"section": "suites", "name": name, "does": _line(config)} for name, config in SUITES.items()]
    sections = [*REGISTRY, "suites"]
    if section not in (None, *sections):
        raise Refusal(f"section {section!r} has no methods; {allowed(sections, section)}.")
    return [row for row in rows if section in (None, row["section"])]


def listed(params: Params) -> list[dict[str, Any]]:
    """Return a row for all that params.yaml names: `name`, `source`, `method`, `exists` and `does`."""
    return list(_listed(params))


def _listed(params: Params) -> Iterator[dict[str, Any]]:
    for name, model in params.models.items():
        yield _row(f"base/{name}", model.source, tag(type(model)), MODELS / "base" / name, model)
    for name, dataset in params.datasets.items():
        source = getattr(dataset, "source", None)
        yield _row(f"datasets/{name}", source, tag(type(dataset)), DATASETS / name, dataset)
    for name, recipe in params.recipes().items():
        section, _, key = name.partition("/")
        place = DATASETS / key if section == "teach" else MODELS / name
        yield _row(name, recipe.source, getattr(recipe, "method", section), place, recipe)
    for kind, suites in params.suites.by_kind().items():
        for name, suite in suites.items():
            done = all((RESULTS / candidate / name).exists() for candidate in params.evaluate.candidates)
            yield _row(f"suites/{name}", None, kind, None, suite) | {"exists": done}


def catalog_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return rows of `known_methods` or `listed` ready to print."""
    table = Table(box=box.SIMPLE)
    for column in rows[0]:
        table.add_column(column, no_wrap=column != "does")
    for row in rows:
        table.add_row(
            *(escape({True: "yes", False: "no", None: ""}.get(value, value)) for value in row.values())
        )
    return table


def _row(name: str, source: str | None, method: str, place: Path | None, config: Strict) -> dict[str, Any]:
    exists = place is not None and place.exists()
    return {"name": name, "source": source, "method": method, "exists": exists, "does": _line(type(config))}


def _line(config: type[Strict]) -> str:
    return (config.__doc__ or "").strip().splitlines()[0]

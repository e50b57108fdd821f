"""What is wrong between the parts of a params.yaml, one sentence an offender.

A field is wrong by itself (`stages.job.sentences`) or beside the others: a source that is not there, a
cycle, a group_size that does not divide. Both kinds are told at once: lineage is read from the raw file
(`entries`), the rest from its sound entries: what recipes are made from (`recipes`), what they learn from
(`learning`), what suites score (`suites`), and the small rest here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.job.checks.learning import of_teaching
from stages.job.checks.recipes import of_recipes
from stages.job.checks.suites import of_suites
from stages.sources.benchmark import Benchmark

if TYPE_CHECKING:
    from stages.job.params import Params


def between(params: "Params", broken: set[str]) -> Iterator[str]:
    """What is wrong between sections that are each well-formed.

    Args:
        broken: data sets that are told of already.
    """
    yield from of_recipes(params, broken)
    yield from of_suites(params, broken)
    yield from _of_noise(params)
    yield from of_teaching(params)
    for section in ("datasets", "teach"):
        if "none" in getattr(params, section):
            yield f"{section}.none: the name none is taken, it stands for no data; rename it."
    for section in ("models", "datasets"):
        for name, entry in getattr(params, section).items():
            yield from _of_source(f"{section}.{name}", entry)
            if isinstance(entry, Benchmark) and entry.nltk_data:
                yield from _of_source(f"{section}.{name}.nltk_data", entry.nltk_data)
    if params.run.device not in ("auto", "cpu"):  # which every machine has, and asking torch takes seconds
        try:
            params.run.resolved_device()
        except Refusal as refusal:
            yield str(refusal)


def _of_noise(params: "Params") -> Iterator[str]:
    """Noise candidates that would differ from their source in nothing, for every suite or for some."""
    for name, variant in params.noise.items():
        if variant.dtype == params.run.dtype:
            yield (
                f"noise.{name}.dtype: {variant.dtype} is already that of the run, so nothing would differ; "
                "take another one."
            )
        elif variant.dtype is None and variant.batch_size is None:
            yield f"noise.{name}: nothing would differ from its source; give it a batch_size or a dtype."
        same = [
            key for key, suite in params.suites.by_name().items() if suite.batch_size == variant.batch_size
        ]
        if same and variant.dtype is None:
            yield (
                f"noise.{name}.batch_size: {variant.batch_size} is already the batch size of the suite(s) "
                f"{', '.join(same)}, so nothing would differ; take another one."
            )


def _of_source(at: str, entry: Any) -> Iterator[str]:
    source = getattr(entry, "source", "hub:")
    if not source.startswith("hub:") and entry.sha256 is None:
        yield f"{at}.sha256: this field is missing; only the commit of a hub: source can stand for it."
    if source.startswith("path:") and not Path(source.removeprefix("path:")).exists():
        yield f"{at}.source: {source} does not exist."


def changed_paths(params: "Params") -> Iterator[str]:
    """`path:` sources whose content is not what their sha256 says; reads all of it, so no stage asks."""
    for section in ("models", "datasets"):
        for name, entry in getattr(params, section).items():
            source, expected = getattr(entry, "source", ""), getattr(entry, "sha256", None)
            if source.startswith("path:"):
                inner = (
                    getattr(entry, "folder", "") or getattr(entry, "file", "") or getattr(entry, "pinned", "")
                )
                path = Path(source.removeprefix("path:")) / inner
                if not path.exists():
                    yield f"{section}.{name}.source: {source} has no {inner}."
                elif (actual := sha256(path)) != expected:
                    yield f"{section}.{name}.sha256: {path} has {actual}; write that if its content is right."

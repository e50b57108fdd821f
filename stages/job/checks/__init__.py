"""Mistakes between the parts of params.yaml, one sentence each.

A field is wrong by itself (`stages.job.sentences`) or beside the others: a source that does not exist, a
cycle, a group_size that does not divide. Both kinds are reported at once. Lineage is read from the raw file
(`entries`), the rest from its sound entries: what recipes read (`recipes`), what they learn from
(`learning`), what suites score (`suites`), what studies name (`studies`), missing hashes (`hashes`), and the
remaining sections here.
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.controls.candidates import Noise
from stages.core.backend import MISSING, installed
from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.evaluation.suite import Suite
from stages.job.checks.hashes import is_empty
from stages.job.checks.learning import of_teaching
from stages.job.checks.recipes import of_recipes
from stages.job.checks.studies import of_studies
from stages.job.checks.suites import of_suites
from stages.job.params import Params
from stages.sources.benchmark import Benchmark
from stages.sources.mix import Mix

log = logging.getLogger(__name__)
SOURCED = ("models", "datasets")
"""The sections whose entries are downloaded."""


def between(params: Params, broken: set[str], device: bool) -> Iterator[str]:
    """Yield the mistakes between sections that are each well-formed.

    Args:
        broken: data sets with mistakes of their own, which are reported already.
        device: whether this machine must have `run.device`.
    """
    yield from of_recipes(params, broken)
    yield from of_suites(params, broken)
    yield from _of_noise(params)
    yield from of_teaching(params)
    yield from of_studies(params, broken)
    for section in ("datasets", "teach"):
        if "none" in getattr(params, section):
            yield f"{section}.none: the name none stands for no data; rename this data set."
    for at, entry in _sourced(params):
        yield from _of_source(at, entry)
    if device and params.run.device not in ("auto", "cpu"):  # every machine has these; torch takes seconds
        if "torch" not in sys.modules:
            log.info("run.device is %s: loading torch to see whether this machine has it", params.run.device)
        try:
            params.run.resolved_device()
        except Refusal as refusal:
            yield str(refusal)


def _of_noise(params: Params) -> Iterator[str]:
    """Yield noise candidates that do not differ from their source, for every suite or for some."""
    for name, variant in params.noise.items():
        if params.run.numerics == "portable" and variant.dtype not in (None, "float32"):
            yield f"noise.{name}.dtype: {variant.dtype} given; numerics portable is fp32; leave dtype out."
        if variant.dtype == params.run.dtype:
            omit = ", or leave dtype out" if variant.batch_size else ""
            yield f"noise.{name}.dtype: {variant.dtype} is already run.dtype; choose another dtype{omit}."
        elif not (variant.dtype or variant.batch_size or variant.backend or variant.rounding):
            yield (
                f"noise.{name}: nothing differs from its source; give it a batch_size, a dtype, a backend or "
                "rounding."
            )
            continue
        if variant.backend == "vllm" and not installed():
            yield f"noise.{name}.backend: {MISSING}."
            continue
        suites = params.suites.by_name().items()
        if variant.rounding is not None and (
            engines := [name for name, suite in suites if "vllm" in (variant.backend, suite.backend)]
        ):
            yield (
                f"noise.{name}.rounding: vLLM adds no rounding noise, and it would answer suite(s) "
                f"{', '.join(engines)}; set backend: transformers there, or leave rounding out."
            )
        if variant.dtype is not None or variant.rounding is not None:
            continue
        same = [
            suite
            for suite, settings in suites
            if variant.batch_size in (None, settings.batch_size) and not _moves(variant, settings)
        ]
        if same and variant.backend:
            yield (
                f"noise.{name}.backend: suite(s) {', '.join(same)} would be answered by the engine and at "
                "the batch size of its source, so nothing would differ; give it another batch_size too."
            )
        elif same:
            yield (
                f"noise.{name}.batch_size: {variant.batch_size} is already the batch size of suite(s) "
                f"{', '.join(same)}, so nothing would differ; choose another."
            )


def _moves(variant: Noise, suite: Suite) -> bool:
    """Tell whether a noise candidate changes the engine that answers a suite."""
    if variant.backend in (None, suite.backend):
        return False
    return variant.backend == "transformers" or suite.refuses_vllm() is None


def _of_source(at: str, entry: Any) -> Iterator[str]:
    source = getattr(entry, "source", "hub:")
    if source.startswith("path:") and not Path(source.removeprefix("path:")).exists():
        yield f"{at}.source: {source} does not exist."


def _sourced(params: Params) -> Iterator[tuple[str, Any]]:
    """Yield every setting that may name a source, after its place in params.yaml."""
    for section in SOURCED:
        for name, entry in getattr(params, section).items():
            yield f"{section}.{name}", entry
            if isinstance(entry, Benchmark) and entry.nltk_data:
                yield f"{section}.{name}.nltk_data", entry.nltk_data
            if isinstance(entry, Mix):
                for part, text in entry.parts.items():
                    yield f"{section}.{name}.parts.{part}", text


def changed_paths(params: Params) -> Iterator[str]:
    """Yield `path:` sources whose content, all of which is read, has another sha256 than params say."""
    for at, entry in _sourced(params):
        source, expected = getattr(entry, "source", ""), getattr(entry, "sha256", None)
        if not source.startswith("path:"):
            continue
        fields = ("folder", "file", "pinned")
        inner = next((path for field in fields if (path := getattr(entry, field, ""))), "")
        path = Path(source.removeprefix("path:")) / inner
        if not path.exists():
            yield f"{at}: {source} has no {inner}; correct the path."
        elif is_empty(path):
            yield f"{at}: {path} is empty; correct the path."
        elif (actual := sha256(path)) != expected:
            yield f"{at}.sha256: {path} has {actual}; write this hash if its content is what you want."

"""Candidates that are not compressed models: a model computed differently, and responders without knowledge.

A `noise` candidate is its source, evaluated at another batch size, in another dtype, by another engine, or
with rounding noise after every block (`stages.controls.injected`). What differs is numerical noise, and no
smaller difference between two models means anything. A `floor` candidate is one responder without knowledge
(see `stages.controls.responders`); a task's floor is the best score of all of them.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from stages.controls.responders import RESPONDERS
from stages.core.backend import Backend
from stages.core.run import Dtype
from stages.core.schema import Base, Seed, Source, Strict


def _known(responder: str) -> str:
    if responder not in RESPONDERS:
        raise ValueError(f"allowed: {', '.join(RESPONDERS)}")
    return responder


class Injected(Strict):
    """Noise on the output of every block, in proportion to each value."""

    size: Annotated[float, Field(gt=0, lt=1)]
    """Its standard deviation as a share of the value: 2^-9 (0.001953125) is about what bf16 rounds away."""
    seed: Seed


class Noise(Strict):
    """Section `noise`: a model evaluated at another batch size, in another dtype, by another engine or with
    rounding noise."""

    source: Source
    batch_size: Annotated[int, Field(ge=1)] | None = None
    dtype: Dtype | None = None
    rounding: Injected | None = None
    backend: Backend | None = None
    """The engine, where the suite's answers are all generated; other suites keep theirs, so with these give a
    batch_size or a dtype too."""

    def reads(self) -> dict[str, Any]:
        """Return no data set: only the source is read."""
        return {}


class Floor(Strict):
    """Section `floor`: a responder without knowledge."""

    source: Base
    """The model whose tokenizer and chat template the responder is asked with."""
    responder: Annotated[str, AfterValidator(_known)]

    def reads(self) -> dict[str, Any]:
        """Return no data set: only the source is read."""
        return {}

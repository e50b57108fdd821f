"""Candidates that are not compressed models: a model computed differently, and responders without knowledge.

A `noise` candidate is its source, evaluated at another batch size, in another dtype or by another engine.
What differs is numerical noise, and no smaller difference between two models means anything. A `floor`
candidate is one responder without knowledge (see `stages.controls.responders`); a task's floor is the best
score of all of them.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from stages.controls.responders import RESPONDERS
from stages.core.backend import Backend
from stages.core.run import Dtype
from stages.core.schema import Base, Source, Strict


def _known(responder: str) -> str:
    if responder not in RESPONDERS:
        raise ValueError(f"allowed: {', '.join(RESPONDERS)}")
    return responder


class Noise(Strict):
    """Section `noise`: a model evaluated at another batch size, in another dtype or by another engine."""

    source: Source
    batch_size: Annotated[int, Field(ge=1)] | None = None
    dtype: Dtype | None = None
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

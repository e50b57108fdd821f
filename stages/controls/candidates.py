"""Candidates that are no compressed model: a dense model computed otherwise, and responders without knowledge.

A `noise` candidate is its source again, evaluated at another batch size or in another dtype: what differs is
numerical noise, and no smaller difference between two models means anything. A `floor` candidate answers without
any knowledge: what it scores, every model scores (see `stages.evaluation.null`).
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.core.run import Dtype
from stages.core.schema import Base, Source, Strict

Responder = Literal[
    "uniform", "longest-choice", "empty", "dot", "repeat", "echo", "shuffled", "previous", "random-words"
]


class Noise(Strict):
    """Section `noise`: a model evaluated at another batch size or in another dtype."""

    source: Source
    batch_size: Annotated[int, Field(ge=1)] | None = None
    dtype: Dtype | None = None

    def reads(self) -> dict[str, Any]:
        """Return no data set: only the source is read."""
        return {}


class Floor(Strict):
    """Section `floor`: a responder without knowledge."""

    source: Base
    """The model whose tokenizer and chat template the responder is asked with."""
    responder: Responder

    def reads(self) -> dict[str, Any]:
        """Return no data set: only the source is read."""
        return {}

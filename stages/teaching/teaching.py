"""The settings every way of teaching shares: whose word it is, and on which examples."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.schema import Source
from stages.corpus.examples import Chosen
from stages.corpus.taught import Lesson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Teaching(Chosen):
    """A data set made by a model from another one."""

    source: Source
    """The teacher; as a rule the dense model that what it teaches descends from."""
    method: str
    batch_size: Annotated[int, Field(ge=1)]
    """Examples at a time."""

    def reads(self) -> dict[str, Any]:
        """Return the recipe itself, which names the data set."""
        return {"": self}

    def teach(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Lesson:
        """The examples with what the model says of them or to them.

        Raises:
            Refusal: the data set has too few, or the model cannot serve.
        """
        raise NotImplementedError

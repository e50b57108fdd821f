"""Settings shared by every way of teaching: the teacher, and the examples it teaches."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.schema import Source
from stages.corpus.examples import Selection
from stages.corpus.taught import Lesson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Teaching(Selection):
    """A data set that a model makes from another one."""

    source: Source
    """The teacher; usually the dense model that its students descend from."""
    method: str
    batch_size: Annotated[int, Field(ge=1)]
    """Examples per batch."""

    def reads(self) -> dict[str, Any]:
        """Return the recipe itself, which names the data set."""
        return {"": self}

    def teach(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Lesson:
        """Return the examples with the model's answers or logits.

        Raises:
            Refusal: the data set has too few examples, or the model cannot teach them.
        """
        raise NotImplementedError

"""The settings every recovery recipe shares, whatever is trained, and the learning rate of each step."""

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.core.schema import Recipe, Seed, Strict
from stages.corpus.examples import Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.recovery.arm import Arm
    from stages.recovery.grids import SourceGrid

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Distillation(Strict):
    """How much the teacher's distribution counts beside the data's own tokens."""

    weight: Positive = 1.0
    """Of the divergence from the teacher; that of the cross entropy is 1."""
    temperature: Positive = 1.0
    """Divides the logits of both before they are compared."""


class Tuning(Recipe):
    """Train the source on `train`; a method derives from it and says in `arm` what is trained and how."""

    on_grid: ClassVar[bool] = False
    """Whether it trains on its source's grid, which must be one of integers, and ends on it."""
    train: Train
    """What is trained on and what the held-out loss is taken on."""
    steps: Count | None = None
    """Steps of the optimizer; or `tokens`, one of both."""
    tokens: Count | None = None
    """Attended tokens; training ends with the step that reaches them."""
    batch_size: Count
    """Rows a micro-batch, of training and of held-out loss."""
    accumulation: Count = 1
    """Micro-batches a step."""
    learning_rate: Annotated[float, Field(gt=0, le=1000)]
    """The highest."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the steps in which the learning rate rises, the first step at least."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls afterwards, all but to zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices, decoupled (AdamW): a step takes learning_rate * weight_decay of each weight."""
    clip: Positive = 1.0
    """The largest L2 norm of a step's gradient; longer ones are scaled down to it."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of holding them."""
    distillation: Distillation | None = None
    """Only where the data set holds a teacher's logits."""
    evaluate_at: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """After which steps the held-out loss is taken, beside the last; left out: start and quarters."""
    checkpoint_every: Count = 50
    """Steps between two checkpoints that a killed run goes on from."""
    seed: Seed = 0
    """Of the order of rows and of dropout."""

    def reads(self) -> dict[str, Any]:
        """Return what the recipe trains on."""
        return {"train": self.train}

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            given = "both steps and tokens are" if self.steps else "neither steps nor tokens is"
            raise ValueError(f"{given} given; give one of the two")
        if self.steps and self.evaluate_at and max(self.evaluate_at) > self.steps:
            raise ValueError(
                f"evaluate_at names step {max(self.evaluate_at)}, and there are {self.steps}; lower it, "
                "raise steps, or leave evaluate_at out"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`."""
        warmup = max(1, int(self.warmup * steps))
        rising = (step + 1) / warmup
        if rising < 1 or self.schedule == "constant":
            return self.learning_rate * min(1.0, rising)
        gone = (step + 1 - warmup) / (steps - warmup + 1)
        return self.learning_rate * (
            1 - gone if self.schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2
        )

    def arm(self, model: "PreTrainedModel", grid: "SourceGrid | None") -> "Arm":
        """The model made ready for training.

        Args:
            model: the source in `run.dtype` with plain weights; it is changed in place.
            grid: the source's own number grid, where it is quantized.

        Raises:
            Refusal: the method does not serve this source.
        """
        raise NotImplementedError

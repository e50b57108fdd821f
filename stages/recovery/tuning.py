"""The settings that every recovery recipe shares, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.core.errors import Refusal
from stages.core.schema import Recipe, Seed, Strict
from stages.corpus.examples import Train
from stages.model.artifact import load_record
from stages.model.grid import Codes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.recovery.arm import Arm
    from stages.recovery.grids import SourceGrid

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Distillation(Strict):
    """How much the teacher's distribution counts beside the tokens of the data."""

    weight: Positive = 1.0
    """Weight of the divergence from the teacher; that of the cross entropy is 1."""
    temperature: Positive = 1.0
    """Divides the logits of both before they are compared."""


class Tuning(Recipe):
    """Train the source on `train`. A method derives from it and returns in `arm` what is trained and how."""

    on_grid: ClassVar[bool] = False
    """Whether the method trains on its source's grid, which must be one of integers, and ends on it."""
    train: Train
    """The data to train on and to compute the held-out loss on."""
    steps: Count | None = None
    """Steps of the optimizer; set either these or `tokens`."""
    tokens: Count | None = None
    """Attended tokens; training ends with the step that reaches them."""
    batch_size: Count
    """Rows per micro-batch, for training and for the held-out loss."""
    accumulation: Count = 1
    """Micro-batches per step."""
    learning_rate: Annotated[float, Field(gt=0, le=1000)]
    """Peak learning rate."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the steps in which the learning rate rises; at least the first step."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls afterwards, to just above zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW), on matrices only: each step subtracts
    learning_rate * weight_decay * weight."""
    clip: Positive = 1.0
    """The largest L2 norm of a step's gradient; a longer one is scaled down to it."""
    gradient_checkpointing: bool = False
    """Whether the backward pass recomputes the activations of each block instead of keeping them."""
    distillation: Distillation | None = None
    """Only for a data set that holds a teacher's logits."""
    evaluate_at: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Steps after which the held-out loss is computed, beside the last; default: the start and quarters."""
    checkpoint_every: Count = 50
    """Steps between two checkpoints, from which a killed run resumes."""
    seed: Seed = 0
    """Seeds the order of rows, dropout, LoRA's initial weights and the permutation of `keep: shuffled`."""

    def reads(self) -> dict[str, Any]:
        """Return the data the recipe trains on."""
        return {"train": self.train}

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            budget = "steps and tokens are both set" if self.steps else "neither steps nor tokens is set"
            raise ValueError(f"{budget}; set one of the two")
        if self.steps and self.evaluate_at and max(self.evaluate_at) > self.steps:
            raise ValueError(
                f"evaluate_at names step {max(self.evaluate_at)}, but there are {self.steps} steps; "
                "lower it, raise steps, or leave evaluate_at out"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` (from 0) of `steps`."""
        warmup = max(1, int(self.warmup * steps))
        rising = (step + 1) / warmup
        if rising < 1 or self.schedule == "constant":
            return self.learning_rate * min(1.0, rising)
        progress = (step + 1 - warmup) / (steps - warmup + 1)
        return self.learning_rate * (
            1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        )

    def check_source(self) -> None:
        """Check the recipe against how its source is stored; no weight is read.

        Raises:
            Refusal: `requantize` is missing, has no effect or is impossible; or the method trains on the
                source's grid, and the source has none or one the method does not serve.
        """
        from stages.model.packed import FORMATS

        source, layout = self.source, load_record(self.source)["layout"]
        requantize = getattr(self, "requantize", None)
        no_codes = f"{source} is fake_quantized: no format holds its codes, so its files have no grid"
        if self.on_grid:
            if layout == "dense":
                raise Refusal(
                    f"{self.method} trains on its source's grid, but {source} is dense; quantize it first."
                )
            if layout == "fake_quantized":
                raise Refusal(f"{self.method} trains on its source's grid, but {no_codes}; use lora or full.")
            if not issubclass(FORMATS[layout], Codes):
                raise Refusal(
                    f"{self.method} serves grids of integers, but {source} is {layout}; use lora or full "
                    "with requantize: true, or a source of another quantizer."
                )
        elif layout == "dense" and requantize is not None:
            raise Refusal(f"requantize is set, but {source} is dense and has no grid; leave it out.")
        elif layout != "dense" and requantize is None:
            raise Refusal(
                f"{source} is quantized; add requantize: true to round the result to its grid again, or "
                "false to write a dense checkpoint."
            )
        elif layout == "fake_quantized" and requantize:
            raise Refusal(f"requantize cannot be true: {no_codes}; set it to false for a dense checkpoint.")

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """Prepare the model for training.

        Args:
            model: the source in `run.dtype` with plain weights; it is changed in place.
            grid: the source's own number grid, if it is quantized.

        Raises:
            Refusal: the method does not serve this source.
        """
        raise NotImplementedError

"""The interface of every way to recover a model: what is trained, what a step does, what comes out.

The loop (`stages.recovery.training`) handles batches, schedules, clipping, checkpoints and the curve.
Everything that sets one method apart, and every promise it gives (a mask, a grid), is behind `Arm`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.model.grid import Quantized
    from stages.recovery.freezing import GradientMasks


@dataclass(frozen=True)
class Recovered:
    """The result of training: a plain model, and what must hold of the file it is written to."""

    model: PreTrainedModel
    zeros: Mapping[str, Tensor] = field(default_factory=dict)
    """Positions that must be zero in the file, bool, shaped as stored, by linear; see `zero_masks`."""
    codes: Mapping[str, Quantized] = field(default_factory=dict)
    """The codes that replace weights in the file, by linear; the model's weights are their values. Empty for
    a dense checkpoint."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Facts for the artifact's record, constant from run to run."""


class Arm(ABC):
    """A model in training."""

    model: PreTrainedModel
    """The model that computes the loss, in `run.dtype`."""
    masks: GradientMasks | None = None
    """Which gradients the loop zeroes once a step, before it clips them."""

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that get gradients, by name. Their `grad` is fp32 whatever their dtype."""

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """Change the weights along `grad`, and restore every promise.

        The loop has put the clipped mean gradient of the step into `grad`, and clears it afterwards.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what a later run resumes from: trained weights, their fp32 copies, moments; not copied."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the `state` of an earlier run; training continues from it bit for bit."""

    @abstractmethod
    def finish(self) -> Recovered:
        """Return the model to be written. Nothing is trained after this."""

"""The interface every way of recovering a model serves: what is trained, what a step does, what comes out.

The loop (`stages.recovery.training`) knows batches, schedules, clipping, checkpoints and the curve. All that
makes one method another, and every promise it gives (a mask, a grid), is behind `Arm`.
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


@dataclass(frozen=True)
class Finished:
    """What a training leaves: a plain model, and what must hold of the file that it becomes."""

    model: PreTrainedModel
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    """Positions that must be zero in the file, bool, shaped as stored, by linear; see `zero_masks`."""
    codes: Mapping[str, Quantized] = field(default_factory=dict)
    """By linear, what it is stored as; the model's weights are their values. Empty: a dense checkpoint."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Facts for the artifact's record, constant from run to run."""


class Arm(ABC):
    """A model in training: which parameters get gradients, what a step does to them, and what comes out."""

    model: PreTrainedModel
    """What is run forward, in `run.dtype`."""

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that get gradients, by name. Their `grad` is fp32 whatever their dtype."""

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """Change the weights by what `grad` says, and establish every promise again.

        The loop has put the mean gradient of the step into `grad`, clipped; it clears it afterwards.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on: weights in training, masters, moments. Shares memory."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave in an earlier run; from here on training goes on bit for bit."""

    @abstractmethod
    def finish(self) -> Finished:
        """The model as it will be written. Nothing is trained after this."""

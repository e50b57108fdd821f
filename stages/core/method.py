"""What a method that acts on one weight at a time is, and running it over a whole model.

Such a method is a recipe: frozen settings, the statistic it wants of a linear's inputs (None is
data-free), and a pure function of a weight and that statistic. It knows no modules, files or devices.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from stages.core.calibration import Calibration, calibration_windows
from stages.core.schema import NoData, Recipe
from stages.core.statistics import Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightMethod(Recipe):
    """A recipe whose method replaces one weight `[out, in]` at a time."""

    statistic: ClassVar[type[Statistic] | None] = None
    """What it wants to know of a linear's inputs."""
    calibration: Calibration | NoData
    """The text its statistic is taken on."""

    def weights(self, weight: Tensor, statistic: Any) -> Any:
        """The new weight, or its codes, from `weight` `[out, in]` and the statistic it asked for."""
        raise NotImplementedError

    def compress(
        self,
        model: "PreTrainedModel",
        replace: Callable[[str, Tensor, Statistic | None], Tensor],
        label: str,
    ) -> int:
        """Walk `model` with the statistic wanted on the windows named; returns the linears done.

        Args:
            replace: (linear's full name, weight `[out, in]`, statistic) -> new weight; calls `weights`.
        """
        from stages.core.artifact import load_tokenizer
        from stages.core.blocks import walk

        windows = None
        if isinstance(self.calibration, Calibration):
            windows = calibration_windows(load_tokenizer(self.source), self.calibration)
        return walk(
            model, replace, windows=windows, statistic=self.statistic, ignore=self.ignore, label=label
        )

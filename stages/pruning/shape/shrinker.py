"""What removing neurons and removing heads share: what matters least is found, left out, and written.

Importance is taken on the dense model, from its weights or from one forward pass, and every block keeps the
same number, so that one number in the config says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.compress.select import smallest
from stages.compress.statistics import DeadInputs
from stages.core.errors import Refusal
from stages.core.schema import Seed
from stages.corpus.windows import OptionalTokens, Tokens
from stages.model.blocks import Linear
from stages.pruning.shape.anatomy import Part
from stages.pruning.shape.shrink import Cuts, kept, shrink

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Shrinker(WholeModel):
    """Remove the least important of what a model has many of, the same number in every block."""

    reshapes: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ("activation", "llm-bip")
    """The importances that are taken on text."""
    importance: str
    seed: Seed | None
    calibration: OptionalTokens
    """The tokens that `activation` and `llm-bip` are taken on, through the dense model."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.ignore:
            raise ValueError("ignore must be left out: a matrix cannot keep its size alone")
        if (self.seed is None) == (self.importance == "random"):
            raise ValueError(
                "importance random needs a seed" if self.seed is None else "only importance random has a seed"
            )
        reads = isinstance(self.calibration, Tokens)
        if reads and self.importance not in self.measured:
            raise ValueError(
                f"calibration must be {{dataset: none}}, as importance {self.importance} reads no text"
            )
        if not reads and self.importance in self.measured:
            raise ValueError(f"importance {self.importance} is measured on text; name one to calibrate")
        return self

    def parts(self, model: PreTrainedModel) -> dict[str, Part]:
        """What holds the many things, by the name of its block.

        Raises:
            Refusal: the family has no such part.
        """
        raise NotImplementedError

    def plan(
        self, model: PreTrainedModel, parts: Mapping[str, Part], loudness: Mapping[str, Tensor]
    ) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
        """What is kept, the config's new numbers, and facts for the record.

        Args:
            loudness: `[in]` fp32, see `measure_inputs`, by the name of the block; empty where nothing is
                measured.

        Raises:
            Refusal: what is asked for cannot be, or the family's config cannot say it.
        """
        raise NotImplementedError

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Leave out what matters least."""
        from stages.model.blocks import linears
        from stages.model.checkpoint import zero_masks

        parts = self.parts(model)
        loudness: dict[str, Tensor] = {}
        if isinstance(self.calibration, Tokens):
            windows = context.windows()
            loudness = measure_inputs(model, parts, windows, self.calibration.batch_size, context.label)
        cuts, changes, notes = self.plan(model, parts, loudness)
        zeros = zero_masks(linears(model))
        shrink(model, cuts, changes)
        return Change({name: kept(mask, f"{name}.weight", cuts) for name, mask in zeros.items()}, notes)


def measure_inputs(
    model: nn.Module, parts: Mapping[str, Part], windows: Tensor, batch_size: int | None, label: str
) -> dict[str, Tensor]:
    """The root mean square of every feature that a part writes from, `[in]` fp32 by the name of its block.

    Features that are never anything but zero are logged.

    Raises:
        Refusal: NaN or infinite weights or inputs, or inputs of a writer too large for fp32 sums.
    """
    from stages.compress.statistics import ColumnNorm, Statistic
    from stages.compress.walk import walk

    written = {part.writer.name: name for name, part in parts.items()}
    dead = DeadInputs("of no importance")
    found: dict[str, Tensor] = {}

    def look(linear: Linear, statistic: Statistic | None) -> None:
        if linear.name in written:
            assert isinstance(statistic, ColumnNorm)
            dead.tell(linear.name, statistic.dead())
            found[written[linear.name]] = statistic.norm()

    walk(
        model, look, windows=windows, statistic=ColumnNorm, sequential="none", batch_size=batch_size,
        label=label,
    )  # fmt: skip
    return found


def remaining(count: int, remove: float, what: str) -> int:
    """How many of `count` are left when the share `remove` goes; a broken number is rounded up.

    Raises:
        Refusal: less than one would go.
    """
    left = max(1, ceil(count * (1 - remove) - 1e-6))
    if remove and count == 1:
        raise Refusal(f"there is only one of the {what}, and it must stay.")
    if remove and left == count:
        raise Refusal(f"remove {remove:g} of {count} {what} is less than one; the least is {1 / count:.4g}.")
    return left


def most_important(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest of `scores` `[n]`, ascending int64; of those alike the lowest go.

    Raises:
        Refusal: a score is not finite.
    """
    if not scores.isfinite().all():
        raise Refusal("importance is not a finite number for some of what could be removed.")
    return (~smallest(scores[None], len(scores) - count)[0]).nonzero()[:, 0]


def change_bound(writer: Tensor, loudness: Tensor) -> Tensor:
    """Per input feature of `writer` `[out, in]`, how much its output changes without it (LLM-BIP): `[in]`.

    Args:
        loudness: `[in]` fp32, the root mean square of the feature over tokens.
    """
    return loudness * writer.float().square().sum(0).sqrt()

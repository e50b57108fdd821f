"""The common part of removing neurons and removing heads: score, choose, cut, and write.

Importance is measured on the dense model, from its weights or from one forward pass, and every block keeps
the same number, so that one number in the config describes all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.compress.select import smallest
from stages.compress.statistics import ColumnNorm, DeadInputs, Statistic
from stages.compress.walk import walk
from stages.core.errors import Refusal
from stages.core.numbers import count_of
from stages.core.schema import Seed
from stages.corpus.windows import OptionalTokens, Tokens
from stages.model.blocks import Linear
from stages.pruning.shape.anatomy import Part, whole_linears
from stages.pruning.shape.shrink import Cuts, cut, shrink

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Shrinker(WholeModel):
    """Remove the least important neurons or heads, the same number in every block."""

    reshapes: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ("activation", "llm-bip")
    """The importances that are measured on text."""
    importance: str
    seed: Seed | None
    calibration: OptionalTokens
    """The tokens on which `activation` and `llm-bip` are measured, through the dense model."""

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
            raise ValueError(
                f"importance {self.importance} is measured on text; name a data set in calibration"
            )
        return self

    def parts(self, model: PreTrainedModel) -> dict[str, Part]:
        """Return the parts whose neurons or heads are removed, by the full name of their block.

        Raises:
            Refusal: the family has no such part.
        """
        raise NotImplementedError

    def plan(
        self, model: PreTrainedModel, parts: Mapping[str, Part], rms: Mapping[str, Tensor]
    ) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
        """Return the cuts, the config's new numbers, and facts for the record.

        Args:
            rms: `[in]` fp32, see `measure_inputs`, by the full name of the block; empty if importance is
                not measured.

        Raises:
            Refusal: the number to keep is not possible, or the family's config cannot describe it.
        """
        raise NotImplementedError

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Cut the least important neurons or heads out of `model`."""
        from stages.model.checkpoint import zero_masks

        parts = self.parts(model)
        rms: dict[str, Tensor] = {}
        if isinstance(self.calibration, Tokens):
            windows = context.windows()
            rms = measure_inputs(model, parts, windows, self.calibration.batch_size, context.label)
        cuts, changes, notes = self.plan(model, parts, rms)
        zeros = zero_masks(whole_linears(model))
        shrink(model, cuts, changes)
        return Change({name: cut(mask, f"{name}.weight", cuts) for name, mask in zeros.items()}, notes)


def measure_inputs(
    model: nn.Module, parts: Mapping[str, Part], windows: Tensor, batch_size: int | None, label: str
) -> dict[str, Tensor]:
    """Return the root mean square of every input feature of the parts' writers, `[in]` fp32 by block.

    Features that are zero on every token are logged.

    Raises:
        Refusal: NaN or infinite weights or inputs, or inputs of a writer too large for fp32 sums.
    """
    blocks = {part.writer.name: name for name, part in parts.items()}
    dead = DeadInputs("of no importance")
    rms: dict[str, Tensor] = {}

    def look(linear: Linear, statistic: Statistic | None) -> None:
        if linear.name in blocks:
            assert isinstance(statistic, ColumnNorm)
            dead.log(linear.name, statistic.dead())
            rms[blocks[linear.name]] = statistic.norm()

    def local(linear: Linear) -> str:
        return linear.name.removeprefix(f"{linear.block}.")

    writers = {local(part.writer) for part in parts.values()}
    others = {local(linear) for linear in whole_linears(model)} - writers
    walk(
        model, look, windows=windows, statistic=ColumnNorm, sequential="none", batch_size=batch_size,
        ignore=tuple(sorted(others)), label=label,
    )  # fmt: skip
    return rms


def count_left(count: int, remove: float, kind: str) -> int:
    """Return how many of `count` are left when the share `remove` is removed, rounded up.

    Args:
        kind: what is counted, in the plural, for messages.

    Raises:
        Refusal: less than one would be removed.
    """
    left = max(1, count - count_of(remove, count))
    if remove and count == 1:
        raise Refusal(f"there is only one of the {kind}, and it must stay.")
    if remove and left == count:
        raise Refusal(
            f"remove {remove:g} of {count} {kind} is less than one; the smallest is {1 / count:.4g}."
        )
    return left


def most_important(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest of `scores` `[n]`, ascending int64; ties to the higher index.

    Raises:
        Refusal: a score is not finite.
    """
    if not scores.isfinite().all():
        raise Refusal(
            "some importance scores are NaN or infinite, so they cannot be ranked; nothing was written. Set "
            "run.dtype to bfloat16 or float32, or check the source."
        )
    return (~smallest(scores[None], len(scores) - count)[0]).nonzero()[:, 0]


def change_bound(writer: Tensor, rms: Tensor) -> Tensor:
    """Return by how much the output of `writer` `[out, in]` changes without each feature (LLM-BIP): `[in]`.

    Args:
        rms: `[in]` fp32, the root mean square of the feature over tokens.
    """
    return rms * writer.float().square().sum(0).sqrt()

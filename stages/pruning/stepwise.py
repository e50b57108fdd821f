"""Step-wise pruning with a check after every step, after Agent pruning (2601.09694).

At each step the current model is measured on calibration text: for every block the norms of the inputs of its
linears, and how much the loss would rise to first order. A policy (`stages.pruning.policy`) reads these and
decides which blocks lose how much more. Their masks are Wanda's, from the source's weights and the inputs
just measured, so a weight can come back if another turns out to matter less. If perplexity on held-out
windows rises by more than `max_rise`, the step is undone, to the bit, and the policy sees that.

The target is met exactly, as the last step is cut to fit; otherwise the artifact's notes have the sparsity
reached and the reason to stop. A step costs one forward for the inputs, about three for the gradients, and
one over the held-out windows. The whole model is in memory with a copy of its weights and, while gradients
are summed, their sums in fp32.
"""

from __future__ import annotations

import logging
from collections import Counter
from math import exp, isfinite
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.compress.select import extend_by_row, wanda_scores
from stages.compress.statistics import ColumnNorm, DeadInputs, Statistic
from stages.compress.walk import walk
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import apportion, count_of, spaced
from stages.core.schema import Sparsity
from stages.corpus.windows import Tokens
from stages.model.blocks import Linear, check_length, linears
from stages.pruning.gradients import loss_gradients, mean_loss
from stages.pruning.policy import Answer, Block, Policy, Rules, State, Step, ask

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


class Stepwise(WholeModel):
    """Zero the share `sparsity` of all weights in steps that a policy decides on."""

    method: Literal["stepwise"]
    sparsity: Sparsity
    max_rise: Annotated[float, Field(gt=0)]
    """A step is undone if perplexity rises by more than this share of its last value."""
    max_steps: Annotated[int, Field(ge=1)] = 50
    """The number of steps at most, undone ones included."""
    held_out: Annotated[int, Field(ge=1)] = 8
    """The number of calibration windows, evenly spaced, on which perplexity and nothing else is measured."""
    policy: Policy
    calibration: Tokens

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.held_out >= self.calibration.num_samples:
            raise ValueError(
                f"held_out {self.held_out} leaves none of {self.calibration.num_samples} calibration windows "
                "to measure on; lower it or raise calibration.num_samples"
            )
        if isinstance(self.policy, Rules) and self.policy.cap < self.sparsity:
            raise ValueError(
                f"policy.cap {self.policy.cap:g} is below sparsity {self.sparsity:g}, which cannot then "
                "be reached; raise it or lower sparsity"
            )
        return self

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Prune every linear in steps."""
        from stages.model.checkpoint import zero_masks

        windows = context.windows()
        zeros = zero_masks(linears(model, self.ignore))
        return Change(zeros, self.prune(model, windows))

    def prune(self, model: PreTrainedModel, windows: Tensor) -> dict[str, Any]:
        """Prune `model` in place and return notes: target and reached sparsity, why it stopped, every step.

        Args:
            windows: `[num_samples, sequence_length]` token ids.

        Raises:
            Refusal: the policy's answer is not valid, or the source's perplexity is not finite.
        """
        picked = spaced(len(windows), self.held_out)
        held_out = torch.isin(torch.arange(len(windows)), picked)
        work = Work(model, self, windows[~held_out], windows[picked])
        source = work.perplexity()
        if source is None:
            raise Refusal(
                "the source's perplexity is not finite; nothing was written. Set run.dtype to bfloat16 or "
                "float32, or check the source."
            )
        last = source
        history: list[Step] = []
        stopped, blocks = "", None
        while work.missing and not stopped:
            if len(history) == self.max_steps:
                stopped = f"max_steps {self.max_steps} were taken"
                break
            blocks = blocks or work.measure()
            state = State(
                target=self.sparsity, sparsity=work.sparsity, perplexity=source, max_rise=self.max_rise,
                steps_left=self.max_steps - len(history), blocks=blocks, history=tuple(history),
            )  # fmt: skip
            answer = ask(self.policy, state)
            if stopped := answer.stop:
                break
            undo, applied = work.take(answer)
            reached, perplexity = work.sparsity, work.perplexity()
            kept = perplexity is not None and perplexity <= last * (1 + self.max_rise)
            history.append(Step(prune=applied, sparsity=reached, perplexity=perplexity, kept=kept))
            log.info("step %d: %s", len(history), history[-1].model_dump_json())
            if kept and perplexity:
                last, blocks = perplexity, None
            else:
                work.put_back(undo)
        if work.missing:
            log.warning("stopped at sparsity %.4f of %g: %s", work.sparsity, self.sparsity, stopped)
        return {
            "target": self.sparsity,
            "reached": work.sparsity,
            "stopped": stopped or "the target is reached",
            "perplexity": source,
            "steps": [step.model_dump(mode="json") for step in history],
        }


Undo: TypeAlias = "dict[str, tuple[Tensor, int]]"
"""By a linear's full name: its weight `[out, in]` before a step, and its number of zeros."""


class Work:
    """A model that is being pruned in steps.

    Args:
        measured: `[n, sequence_length]` token ids that inputs and gradients are measured on.
        held_out: `[n, sequence_length]` token ids that perplexity is measured on.
    """

    def __init__(self, model: PreTrainedModel, recipe: Stepwise, measured: Tensor, held_out: Tensor) -> None:
        check_length(model, held_out)
        self._model, self._recipe, self._measured, self._held_out = model, recipe, measured, held_out
        self._linears = linears(model, recipe.ignore)
        self._source = {linear.name: linear.weight.clone() for linear in self._linears}
        self._zeros = {linear.name: int((linear.weight == 0).sum()) for linear in self._linears}
        self._norms: dict[str, Tensor] = {}
        self._dead = DeadInputs("the first of their row to go")
        self._size = sum(weight.numel() for weight in self._source.values())

    @property
    def missing(self) -> int:
        """The number of zeros still missing to the target."""
        target = count_of(self._recipe.sparsity, self._size)
        return max(0, target - sum(self._zeros.values()))

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of the linears."""
        return sum(self._zeros.values()) / self._size

    def perplexity(self) -> float | None:
        """Measure perplexity on the held-out windows; None if it is not finite."""
        loss = mean_loss(self._model, self._held_out)
        return exp(loss) if isfinite(loss) and loss < 700 else None

    def measure(self) -> tuple[Block, ...]:
        """Describe the blocks as they are now, and keep the norms of inputs for the next step's masks."""

        def look(linear: Linear, statistic: Statistic | None) -> None:
            assert isinstance(statistic, ColumnNorm)
            self._norms[linear.name] = statistic.norm()
            self._dead.log(linear.name, statistic.dead())

        walk(
            self._model, look, windows=self._measured, statistic=ColumnNorm, sequential="none",
            batch_size=self._recipe.calibration.batch_size, ignore=self._recipe.ignore, label="stepwise",
        )  # fmt: skip
        gradients, _ = loss_gradients(self._model, self._linears, self._measured, label="stepwise")
        sizes, left = self._counts()
        wanda: dict[str, float] = dict.fromkeys(sizes, 0.0)
        slope = dict(wanda)
        for linear in self._linears:
            scores = wanda_scores(linear.weight, self._norms[linear.name])(slice(None))
            moved = linear.weight.float() * gradients.pop(linear.name)
            wanda[linear.block] += wide_sum(scores)
            slope[linear.block] += wide_sum(moved.abs())
        wanda_z, slope_z = (
            zscores([sums[name] / max(left[name], 1) for name in sizes]) for sums in (wanda, slope)
        )
        return tuple(
            Block(name=name, weights=size, sparsity=1 - left[name] / size, wanda=w, gradient=g)
            for (name, size), w, g in zip(sizes.items(), wanda_z, slope_z, strict=True)
        )

    def take(self, answer: Answer) -> tuple[Undo, dict[str, float]]:
        """Prune as `answer` says, cut to the target; return how to undo it and the shares applied."""
        sizes, left = self._counts()
        wanted = {
            name: min(answer.prune[name] * sizes[name], left[name])
            for name in sizes
            if name in answer.prune and left[name]
        }
        chosen = [linear for linear in self._linears if linear.block in wanted]
        total = min(self.missing, round(sum(wanted.values())))
        factor = min(1.0, self.missing / max(sum(wanted.values()), 1e-9))
        parts = {}
        for linear in chosen:  # of its remaining weights a linear loses the same share as its block
            remaining = linear.weight.numel() - self._zeros[linear.name]
            parts[linear.name] = factor * wanted[linear.block] * remaining / left[linear.block]
        more = apportion(parts, total)
        undo: Undo = {linear.name: (linear.weight.clone(), self._zeros[linear.name]) for linear in chosen}
        lost: Counter[str] = Counter()
        for linear in chosen:
            source, norm = self._source[linear.name], self._norms[linear.name]
            self._zeros[linear.name] += more[linear.name]
            lost[linear.block] += more[linear.name]
            mask = extend_by_row(wanda_scores(source, norm), source == 0, self._zeros[linear.name])
            linear.weight.copy_(source.masked_fill(mask, 0))
        return undo, {name: lost[name] / sizes[name] for name in wanted}

    def put_back(self, undo: Undo) -> None:
        """Undo a step, to the bit."""
        for linear in self._linears:
            if linear.name in undo:
                weight, self._zeros[linear.name] = undo[linear.name]
                linear.weight.copy_(weight)

    def _counts(self) -> tuple[Counter[str], Counter[str]]:
        """Return how many weights each block has, and how many of them are not yet zero, by name."""
        sizes: Counter[str] = Counter()
        left: Counter[str] = Counter()
        for linear in self._linears:
            sizes[linear.block] += linear.weight.numel()
            left[linear.block] += linear.weight.numel() - self._zeros[linear.name]
        return sizes, left


def wide_sum(values: Tensor) -> float:
    """Sum in fp64; on the CPU if the device has no fp64, as Apple's."""
    return float((values.cpu() if values.device.type == "mps" else values).sum(dtype=torch.float64))


def zscores(values: list[float]) -> list[float]:
    """Return how many standard deviations each value is above the mean; zeros if all are equal."""
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]

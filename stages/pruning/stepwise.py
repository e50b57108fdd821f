"""Step-wise pruning with a check at every step, after Agent pruning (2601.09694).

At each step the model as it is by now is measured on calibration text: how loud the inputs of its linears
are and what the loss would lose to first order, a block. A policy (`stages.pruning.policy`) is shown that and
says which blocks are to lose how much more. Their masks are then Wanda's, of the source's weights and the
inputs just measured, so a weight may come back when another turns out to matter less. When perplexity on
held-out windows rises by more than `max_rise`, the step is undone, to the bit, and the policy is told so.

The target is met exactly, the last step being cut to what is missing, or else the artifact's notes say how
far it came and why it stopped there. A step costs one forward for the inputs and about three for the
gradients, and one over the held-out windows. The whole model is in memory, beside a copy of its weights
and, while gradients are summed, their sums in fp32.
"""

from __future__ import annotations

import logging
from collections import Counter
from math import exp, isfinite
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.compress.select import grown_by_row, wanda_scores, whole
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import count_of
from stages.core.schema import Sparsity
from stages.corpus.windows import Tokens
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
    """A step is undone when perplexity rises by more than this share of what it was."""
    max_steps: Annotated[int, Field(ge=1)] = 50
    """Steps in all, those undone included."""
    held_out: Annotated[int, Field(ge=1)] = 8
    """Calibration windows that perplexity is taken on, evenly apart, and nothing else."""
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
                f"with policy.cap {self.policy.cap:g} no sparsity of {self.sparsity:g} can be reached"
            )
        return self

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Prune every linear in steps."""
        from stages.model.blocks import linears
        from stages.model.checkpoint import zero_masks

        windows = context.windows()
        zeros = zero_masks(linears(model, self.ignore))
        return Change(zeros, self.prune(model, windows))

    def prune(self, model: PreTrainedModel, windows: Tensor) -> dict[str, Any]:
        """Prune `model` in place; returns what is noted: the target, what was reached, why, every step.

        Args:
            windows: `[num_samples, sequence_length]` token ids.

        Raises:
            Refusal: the policy's answer is none, perplexity is not finite from the start.
        """
        away = torch.linspace(0, len(windows) - 1, self.held_out).round().long()
        work = Work(model, self, windows[~torch.isin(torch.arange(len(windows)), away)], windows[away])
        before = work.perplexity()
        if before is None:
            raise Refusal("the source's perplexity is not a finite number; nothing was written.")
        last = before
        history: list[Step] = []
        stopped, blocks = "", None
        while work.missing and not stopped:
            if len(history) == self.max_steps:
                stopped = f"max_steps {self.max_steps} were taken"
                break
            blocks = blocks or work.measure()
            state = State(
                target=self.sparsity, sparsity=work.sparsity, perplexity=before, max_rise=self.max_rise,
                steps_left=self.max_steps - len(history), blocks=blocks, history=tuple(history),
            )  # fmt: skip
            answer = ask(self.policy, state)
            if stopped := answer.stop:
                break
            undo, applied = work.take(answer)
            reached, now = work.sparsity, work.perplexity()
            kept = now is not None and now <= last * (1 + self.max_rise)
            history.append(Step(prune=applied, sparsity=reached, perplexity=now, kept=kept))
            log.info("step %d: %s", len(history), history[-1].model_dump_json())
            if kept and now:
                last, blocks = now, None
            else:
                work.put_back(undo)
        if work.missing:
            log.warning("stopped at sparsity %.4f of %g: %s", work.sparsity, self.sparsity, stopped)
        return {
            "target": self.sparsity,
            "reached": work.sparsity,
            "stopped": stopped or "the target is reached",
            "perplexity": before,
            "steps": [step.model_dump(mode="json") for step in history],
        }


Undo: TypeAlias = "dict[str, tuple[Tensor, int]]"
"""By a linear's full name: its weight `[out, in]` before a step, and the zeros it is said to have."""


class Work:
    """A model that is being pruned in steps: what it was, how far it is, how it fares."""

    def __init__(self, model: PreTrainedModel, recipe: Stepwise, seen: Tensor, held: Tensor) -> None:
        from stages.compress.statistics import DeadInputs
        from stages.model.blocks import check_length, linears

        check_length(model, held)
        self._model, self._recipe, self._seen, self._held = model, recipe, seen, held
        self._found = linears(model, recipe.ignore)
        self._source = {one.name: one.weight.clone() for one in self._found}
        self._zeros = {one.name: int((one.weight == 0).sum()) for one in self._found}
        self._norms: dict[str, Tensor] = {}
        self._dead = DeadInputs("the first of their row to go")
        self._size = sum(weight.numel() for weight in self._source.values())

    @property
    def missing(self) -> int:
        """Zeros that are still to be made."""
        target = count_of(self._recipe.sparsity, self._size)
        return max(0, target - sum(self._zeros.values()))

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of the linears."""
        return sum(self._zeros.values()) / self._size

    def perplexity(self) -> float | None:
        """On the held-out windows; None where it is no finite number."""
        from stages.pruning.gradients import mean_loss

        loss = mean_loss(self._model, self._held)
        return exp(loss) if isfinite(loss) and loss < 700 else None

    def measure(self) -> tuple[Block, ...]:
        """The blocks as they are by now; the norms of the inputs are kept for the next step's masks."""
        from stages.compress.statistics import ColumnNorm, Statistic
        from stages.compress.walk import walk
        from stages.model.blocks import Linear
        from stages.pruning.gradients import loss_gradients

        def look(linear: Linear, statistic: Statistic | None) -> None:
            assert isinstance(statistic, ColumnNorm)
            self._norms[linear.name] = statistic.norm()
            self._dead.tell(linear.name, statistic.dead())

        walk(
            self._model, look, windows=self._seen, statistic=ColumnNorm, sequential="none",
            batch_size=self._recipe.calibration.batch_size, ignore=self._recipe.ignore, label="stepwise",
        )  # fmt: skip
        gradients, _ = loss_gradients(self._model, self._found, self._seen, label="stepwise")
        sizes: Counter[str] = Counter()
        left: Counter[str] = Counter()
        wanda: dict[str, float] = dict.fromkeys((one.block for one in self._found), 0.0)
        slope = dict(wanda)
        for one in self._found:
            sizes[one.block] += one.weight.numel()
            left[one.block] += one.weight.numel() - self._zeros[one.name]
            scores = wanda_scores(one.weight, self._norms[one.name])(slice(None))
            moved = one.weight.float() * gradients.pop(one.name)
            wanda[one.block] += float(scores.sum(dtype=torch.float64))
            slope[one.block] += float(moved.abs().sum(dtype=torch.float64))
        loud, steep = (
            zscores([sums[name] / max(left[name], 1) for name in wanda]) for sums in (wanda, slope)
        )
        return tuple(
            Block(name=name, weights=sizes[name], sparsity=1 - left[name] / sizes[name], wanda=w, gradient=g)
            for name, w, g in zip(wanda, loud, steep, strict=True)
        )

    def take(self, answer: Answer) -> tuple[Undo, dict[str, float]]:
        """Prune as `answer` says, cut to what is missing; returns how to undo it and the shares applied."""
        sizes: Counter[str] = Counter()
        free: Counter[str] = Counter()
        for one in self._found:
            sizes[one.block] += one.weight.numel()
            free[one.block] += one.weight.numel() - self._zeros[one.name]
        asked = {
            name: min(answer.prune[name] * sizes[name], free[name])
            for name in sizes
            if name in answer.prune and free[name]
        }
        chosen = [one for one in self._found if one.block in asked]
        total = min(self.missing, round(sum(asked.values())))
        part = min(1.0, self.missing / max(sum(asked.values()), 1e-9))
        parts = {}
        for one in chosen:  # a linear loses as large a part of what it has left as the block does
            left = one.weight.numel() - self._zeros[one.name]
            parts[one.name] = part * asked[one.block] * left / free[one.block]
        more = whole(parts, total)
        undo: Undo = {one.name: (one.weight.clone(), self._zeros[one.name]) for one in chosen}
        gone: Counter[str] = Counter()
        for one in chosen:
            source, norm = self._source[one.name], self._norms[one.name]
            self._zeros[one.name] += more[one.name]
            gone[one.block] += more[one.name]
            mask = grown_by_row(wanda_scores(source, norm), source == 0, self._zeros[one.name])
            one.weight.copy_(source.masked_fill(mask, 0))
        return undo, {name: gone[name] / sizes[name] for name in asked}

    def put_back(self, undo: Undo) -> None:
        """Undo a step, to the bit."""
        for one in self._found:
            if one.name in undo:
                weight, self._zeros[one.name] = undo[one.name]
                one.weight.copy_(weight)


def zscores(values: list[float]) -> list[float]:
    """How many standard deviations each is above the mean; zeros where all are alike."""
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]

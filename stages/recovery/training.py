"""The loop that trains an arm: the rows and rate of each step, the number of steps, and resuming killed runs.

The recipe and the number of a step decide all that the step does: its rows (`StepPlan`), its learning rate,
its dropout. So a checkpoint holds the arm's tensors and the curve, and no state of any generator. The loop is
our own because transformers' Trainer picks a device by itself, pickles its state, and knows no step that is
not an optimizer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.memory import TRAINED, cures, exhausted, keep_freed
from stages.core.numbers import generator, seed_of
from stages.corpus.rows import Row, collate
from stages.recovery import objective
from stages.recovery.arm import Arm
from stages.recovery.curve import Point
from stages.recovery.saves import Checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.corpus.examples import Examples
    from stages.recovery.tuning import Tuning


class Diverged(Refusal):
    """A loss or gradient became NaN or infinite; the same steps would lead there again."""


class StepPlan:
    """The number of steps and the rows of each: every row once, in a drawn order, before any row repeats.

    Args:
        sizes: tokens of each row.

    Attributes:
        steps: the number of steps.
        evaluated: the steps after which the held-out loss is computed; always the last, to see the whole
            effect.
    """

    def __init__(self, recipe: Tuning, sizes: Sequence[int]) -> None:
        self._recipe, self._sizes = recipe, sizes
        self._epoch, self._order = -1, list[int]()
        self.steps = recipe.steps or self._steps(recipe.tokens or 0)
        last = max(recipe.evaluate_at or (0,))
        if last > self.steps:
            raise Refusal(
                f"evaluate_at names step {last}, but {recipe.tokens} tokens are reached after {self.steps} "
                "steps; lower it, raise tokens, or leave evaluate_at out."
            )
        quarters = {round(self.steps * quarter / 4) for quarter in range(5)}
        self.evaluated = {*(recipe.evaluate_at or quarters), self.steps}

    def rows(self, step: int) -> list[list[int]]:
        """Return the row numbers of each micro-batch of `step`, both counted from 0."""
        size, parts = self._recipe.batch_size, self._recipe.accumulation
        start = step * parts * size
        return [
            [self._at(place) for place in range(first, first + size)]
            for first in range(start, start + parts * size, size)
        ]

    def tokens(self, step: int) -> int:
        """Return the number of tokens that `step` attends to."""
        return sum(self._sizes[row] for part in self.rows(step) for row in part)

    def _at(self, place: int) -> int:
        epoch, inside = divmod(place, len(self._sizes))
        if epoch != self._epoch:
            draw = generator(f"{self._recipe.seed} epoch {epoch}")
            self._epoch, self._order = epoch, torch.randperm(len(self._sizes), generator=draw).tolist()
        return self._order[inside]

    def _steps(self, budget: int) -> int:
        step = reached = 0
        while reached < budget:
            reached += self.tokens(step)
            step += 1
        return step


def train(label: str, recipe: Tuning, arm: Arm, examples: Examples, checkpoints: Checkpoints) -> list[Point]:
    """Train `arm` to the end of its budget, from the last checkpoint if there is one.

    Args:
        label: the text beside the progress bar.

    Returns:
        The learning curve, with a point for the start and one for each step.

    Raises:
        Refusal: the weights, the loss or its gradient became NaN or infinite. A `Diverged` training leaves no
            checkpoint.
    """
    plan = StepPlan(recipe, [sum(len(example.input_ids) for example in row) for row in examples.train])
    if recipe.gradient_checkpointing:
        arm.model.activation_checkpointing_enable({"use_reentrant": False})
    arm.model.train()
    keep_freed(below=TRAINED)
    try:
        return _train(label, recipe, arm, examples, checkpoints, plan)
    except Diverged:
        checkpoints.clear()
        raise


def _train(
    label: str, recipe: Tuning, arm: Arm, examples: Examples, checkpoints: Checkpoints, plan: StepPlan
) -> list[Point]:
    def held_out(step: int) -> float | None:
        if step not in plan.evaluated:
            return None
        loss = held_out_loss(arm.model, examples.held_out, recipe.batch_size)
        _check_finite(loss, "held-out loss", recipe, step)
        return loss

    if checkpoint := checkpoints.last():
        state, points = checkpoint
        arm.load(state)
        curve = [Point(**point) for point in points]
    else:
        curve = [Point(0, 0, None, None, held_out(0))]
    with tqdm(total=plan.steps, initial=len(curve) - 1, desc=label, unit="step") as bar:
        for step in range(len(curve) - 1, plan.steps):
            rate = recipe.rate(step, plan.steps)
            parts = [[examples.train[row] for row in part] for part in plan.rows(step)]
            loss = take_step(recipe, arm, parts, step, rate)
            tokens = curve[-1].tokens + plan.tokens(step)
            curve.append(Point(step + 1, tokens, rate, loss, held_out(step + 1)))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if (step + 1) % checkpoints.every == 0 and step + 1 < plan.steps:
                checkpoints.save(step + 1, arm.state(), [asdict(point) for point in curve])
    return curve


def take_step(recipe: Tuning, arm: Arm, parts: Sequence[Sequence[Row]], step: int, rate: float) -> float:
    """Train on the micro-batches `parts` and return the loss, the mean over all their predicted tokens."""
    batches = [collate(rows) for rows in parts]
    predicted = sum(batch.predicted for batch in batches)
    torch.manual_seed(seed_of(f"{recipe.seed} step {step}"))
    means, counts = [], []
    for batch in batches:
        mean, count = objective.batch_loss(arm.model, batch, recipe.distillation)
        (mean * (count / predicted)).backward()
        means.append(mean.detach())
        counts.append(count)
    if arm.masks:
        arm.masks.apply()
    trained = list(arm.trained().values())
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    *losses, length = torch.stack([*means, norm]).tolist()  # the only time a step waits for its device
    total = 0.0
    for loss, count in zip(losses, counts, strict=True):
        total += loss * count / predicted
    _check_finite(total, "training loss", recipe, step + 1)
    _check_finite(length, "training gradient", recipe, step + 1)
    if length > recipe.clip:
        torch.nn.utils.clip_grads_with_norm_(trained, recipe.clip, norm)
    arm.step(rate)
    for parameter in trained:
        parameter.grad = None
    return total


def _check_finite(value: float, what: str, recipe: Tuning, step: int) -> None:
    if not -torch.inf < value < torch.inf:
        if step == 0:
            raise Diverged(
                f"the {what} of {recipe.source} is {value} before any training; use another source, or check "
                "its weights."
            )
        raise Diverged(
            f"the {what} became {value} at step {step}; lower learning_rate "
            f"(now {recipe.learning_rate}) or clip (now {recipe.clip}), or raise warmup "
            f"(now {recipe.warmup})."
        )


def held_out_loss(model: PreTrainedModel, rows: Sequence[Row], batch_size: int) -> float:
    """Return the mean cross entropy over all predicted tokens of `rows`, in nats; keep the model's mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        batches = [collate(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
        means, counts = zip(*(objective.batch_loss(model, batch, None) for batch in batches), strict=True)
    model.train(training)
    total = 0.0
    for loss, count in zip(torch.stack(means).tolist(), counts, strict=True):
        total += loss * count
    return total / sum(counts)


@contextmanager
def refusing_out_of_memory(recipe: Tuning) -> Iterator[None]:
    """Turn an out-of-memory error of any device into a refusal that says which settings need less.

    Raises:
        Refusal: the body ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not exhausted(error):
            raise
        settings = [f"lower train.sequence_length (now {recipe.train.sequence_length})"]
        if recipe.batch_size > 1:
            settings.insert(
                0,
                f"lower batch_size (now {recipe.batch_size}; raise accumulation, now {recipe.accumulation}, "
                "to make up for it)",
            )
        if not recipe.gradient_checkpointing:
            settings.append("set gradient_checkpointing: true")
        raise Refusal(f"there is not enough memory; {cures(error, *settings)}.") from error

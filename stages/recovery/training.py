"""The loop that trains an arm: which rows when, at what rate, for how long, and where a killed run goes on.

All that a step does is decided by the recipe and the step's number: its rows (`Plan`), its learning rate, its
draws of dropout. So a checkpoint holds the arm's tensors and the curve, and nothing of any generator. The
loop is our own: transformers' Trainer picks a device by itself, pickles its state, and knows no step that is
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
from stages.core.memory import TRAINED, exhausted, keep_freed
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
    """A number of the training is none any more; the same steps would lead there again."""


class Plan:
    """The rows of every step: each row once, in a drawn order, before any comes again.

    Args:
        sizes: tokens of each row.
    """

    def __init__(self, recipe: Tuning, sizes: Sequence[int]) -> None:
        self._recipe, self._sizes = recipe, sizes
        self._epoch, self._order = -1, list[int]()
        self.steps = recipe.steps or self._steps(recipe.tokens or 0)
        last = max(recipe.evaluate_at or (0,))
        if last > self.steps:
            raise Refusal(
                f"evaluate_at names step {last}, and {recipe.tokens} tokens are reached after {self.steps}; "
                "lower it, raise tokens, or leave evaluate_at out."
            )
        quarters = {round(self.steps * quarter / 4) for quarter in range(5)}
        self.evaluated = {*(recipe.evaluate_at or quarters), self.steps}
        """After which steps the held-out loss is taken; after the last always, to see what it has done."""

    def rows(self, step: int) -> list[list[int]]:
        """The numbers of the rows of each micro-batch of `step`, counted from 0."""
        size, parts = self._recipe.batch_size, self._recipe.accumulation
        start = step * parts * size
        return [
            [self._at(place) for place in range(first, first + size)]
            for first in range(start, start + parts * size, size)
        ]

    def tokens(self, step: int) -> int:
        """How many tokens `step` attends to."""
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
        label: whose progress is shown.

    Returns:
        The learning curve, with a point for the start and one for each step.

    Raises:
        Refusal: memory does not suffice, or (`Diverged`, and then no checkpoint is left) the loss or its
            gradient is no number any more.
    """
    plan = Plan(recipe, [sum(len(one.input_ids) for one in row) for row in examples.train])
    _prepare(arm.model, recipe)
    try:
        with memory(recipe):
            return _train(label, recipe, arm, examples, checkpoints, plan)
    except Diverged:
        checkpoints.clear()
        raise


def _prepare(model: PreTrainedModel, recipe: Tuning) -> None:
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    keep_freed(below=TRAINED)


def _train(
    label: str, recipe: Tuning, arm: Arm, examples: Examples, checkpoints: Checkpoints, plan: Plan
) -> list[Point]:
    def held_out(step: int) -> float | None:
        if step not in plan.evaluated:
            return None
        found = held_out_loss(arm.model, examples.held_out, recipe.batch_size)
        _check(found, "held-out loss", recipe, step)
        return found

    if found := checkpoints.last():
        state, told = found
        arm.load(state)
        curve = [Point(**point) for point in told]
    else:
        curve = [Point(0, 0, None, None, held_out(0))]
    with tqdm(total=plan.steps, initial=len(curve) - 1, desc=label, unit="step") as bar:
        for step in range(len(curve) - 1, plan.steps):
            rate = recipe.rate(step, plan.steps)
            loss = _step(
                recipe, arm, [[examples.train[row] for row in part] for part in plan.rows(step)], step, rate
            )
            tokens = curve[-1].tokens + plan.tokens(step)
            curve.append(Point(step + 1, tokens, rate, loss, held_out(step + 1)))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if (step + 1) % checkpoints.every == 0 and step + 1 < plan.steps:
                checkpoints.save(step + 1, arm.state(), [asdict(point) for point in curve])
    return curve


def _step(recipe: Tuning, arm: Arm, parts: Sequence[Sequence[Row]], step: int, rate: float) -> float:
    """Do one step and return its loss, the mean over the predicted tokens of all its micro-batches."""
    batches = [collate(rows) for rows in parts]
    predicted = sum(batch.predicted for batch in batches)
    torch.manual_seed(seed_of(f"{recipe.seed} step {step}"))
    total = 0.0
    for batch in batches:
        mean, count = objective.loss(arm.model, batch, recipe.distillation)
        total += mean.item() * count / predicted
        _check(total, "training loss", recipe, step)
        (mean * (count / predicted)).backward()
    trained = list(arm.trained().values())
    norm = torch.nn.utils.get_total_norm([one.grad for one in trained if one.grad is not None])
    _check(norm.item(), "training gradient", recipe, step)
    if norm > recipe.clip:
        torch.nn.utils.clip_grads_with_norm_(trained, recipe.clip, norm)
    arm.step(rate)
    for parameter in trained:
        parameter.grad = None
    return total


def _check(value: float, what: str, recipe: Tuning, step: int) -> None:
    if not -torch.inf < value < torch.inf:
        raise Diverged(
            f"the {what} became {value} at step {step}; lower learning_rate "
            f"(now {recipe.learning_rate}) or clip (now {recipe.clip}), or raise warmup "
            f"(now {recipe.warmup})."
        )


def held_out_loss(model: PreTrainedModel, rows: Sequence[Row], batch_size: int) -> float:
    """Mean cross entropy over all predicted tokens of `rows`, in nats; the model is left as it was."""
    was, total, predicted = model.training, 0.0, 0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(rows), batch_size):
            mean, count = objective.loss(model, collate(rows[first : first + batch_size]), None)
            total, predicted = total + mean.item() * count, predicted + count
    model.train(was)
    return total / predicted


@contextmanager
def memory(recipe: Tuning) -> Iterator[None]:
    """Tell of memory that does not suffice as what it is, on whatever device.

    Raises:
        Refusal: the body ran out of it.
    """
    try:
        yield
    except Exception as error:
        if not exhausted(error):
            raise
        raise Refusal(
            f"there is not enough memory; lower batch_size (now {recipe.batch_size}; a higher accumulation, "
            f"now {recipe.accumulation}, makes up for it) or train.sequence_length (now "
            f"{recipe.train.sequence_length}), or set gradient_checkpointing: true"
            f"{' (it is)' if recipe.gradient_checkpointing else ''}."
        ) from error

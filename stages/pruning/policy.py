"""The policies of step-wise pruning, which decide at each step how much each block loses.

A policy reads the state of the work and answers with shares to take from blocks, or with a reason to stop
(2601.09694, where a language model decides). It sees no weights: for every block its sparsity and two
sensitivities, both z-scored over blocks, and for every step so far the shares pruned, the perplexity after it
and whether it was kept. `Rules` decides by a rule. `Command` runs a program, which is how a language model is
plugged in: the program reads a `State` as JSON on its standard input and writes an `Answer` as JSON.

No hash covers a program: if its answers change, the same recipe gives another artifact.
"""

import os
import signal
import subprocess
from contextlib import suppress
from math import ceil
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from stages.core.errors import Refusal
from stages.core.schema import Strict

SLACK = 1e-9
"""By how much a sum of decimal shares may exceed 1."""


class Block(Strict):
    """A decoder block as a policy sees it."""

    name: str
    weights: int
    """The number of weights in its linears."""
    sparsity: float
    wanda: float
    """The z-score of the mean |w| * norm of its input over the weights that are left."""
    gradient: float
    """The z-score of the mean |w * gradient| over the same weights."""


class Step(Strict):
    """An earlier step and its outcome."""

    prune: dict[str, float]
    """The share of its weights that each block lost, by name; the last step can take less than answered."""
    sparsity: float
    """Of the whole model, after the step."""
    perplexity: float | None
    """On held-out windows, after the step; null if it was not finite."""
    kept: bool
    """False if the step was undone."""


class State(Strict):
    """Everything a policy knows."""

    target: float
    sparsity: float
    perplexity: float
    """Of the source."""
    max_rise: float
    steps_left: int
    blocks: tuple[Block, ...]
    history: tuple[Step, ...]


class Answer(Strict):
    """The further share of its weights each block is to lose, by name; or a reason to stop."""

    prune: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    stop: str = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.prune) == bool(self.stop):
            raise ValueError("either prune names blocks or stop gives a reason")
        return self


class Rules(Strict):
    """Take `step` from each of the least sensitive blocks, half as much after every step that was undone."""

    kind: Literal["rules"]
    step: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share a block loses at the first step."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of blocks pruned at a step: those with the lowest sum of z-scores."""
    cap: Annotated[float, Field(gt=0, le=1)] = 0.9
    """The highest sparsity of a block."""
    patience: Annotated[int, Field(ge=0)] = 4
    """The number of undone steps it accepts before it stops."""

    def decide(self, state: State) -> Answer:
        """Answer from the state alone."""
        failed = sum(not step.kept for step in state.history)
        if failed > self.patience:
            return Answer(stop=f"perplexity rose by more than max_rise at {failed} steps")
        free = [block for block in state.blocks if block.sparsity < self.cap]
        if not free:
            return Answer(stop=f"every block has lost {self.cap:g}")
        chosen = sorted(free, key=lambda block: block.wanda + block.gradient)
        chosen = chosen[: ceil(self.fraction * len(state.blocks))]
        step = self.step / 2**failed
        return Answer(prune={block.name: min(step, self.cap - block.sparsity) for block in chosen})


def _argument(value: str) -> str:
    if "\0" in value:
        raise ValueError("allowed: any text without a NUL character, which no program can get as an argument")
    return value


class Command(Strict):
    """Run a program that decides, once a step, in the project's folder, without a shell.

    It runs in a session of its own. If the answer is late, the whole session is killed, child processes
    included.
    """

    kind: Literal["command"]
    command: Annotated[
        tuple[Annotated[str, Field(min_length=1), AfterValidator(_argument)], ...], Field(min_length=1)
    ]
    """The program and its arguments."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds the program may take to answer."""

    def decide(self, state: State) -> Answer:
        """Return the program's answer.

        Raises:
            Refusal: it cannot be run, fails, takes too long, or does not write an `Answer`.
        """
        name = f"policy command {self.command[0]}"
        try:
            code, out, err = self._run(state.model_dump_json())
        except subprocess.TimeoutExpired:
            raise Refusal(
                f"{name} did not answer within {self.timeout:g} seconds; raise policy.timeout or fix it."
            ) from None
        except OSError as error:
            raise Refusal(f"{name} cannot be run: {error.strerror}; fix policy.command.") from None
        if code:
            last = (err.strip().splitlines() or ["standard error is empty"])[-1]
            raise Refusal(f"{name} failed with exit code {code} ({last[:200].rstrip('.')}); fix the program.")
        try:
            return Answer.model_validate_json(out)
        except ValidationError as error:
            raise Refusal(
                f"{name} wrote {_shortened(out)}, which is no answer ({_mistakes(error)}); write JSON like "
                '{"prune": {"<block>": 0.05}} or {"stop": "<reason>"}.'
            ) from None

    def _run(self, state: str) -> tuple[int, str, str]:
        """Return the program's exit code, standard output and standard error for this standard input."""
        with subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace", start_new_session=True,
        ) as program:  # fmt: skip
            try:
                out, err = program.communicate(state, self.timeout)
            except BaseException:  # also an interrupt, which does not reach another session by itself
                with suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
                raise
        return program.returncode, out, err


Policy = Annotated[Rules | Command, Field(discriminator="kind")]


def ask(policy: Rules | Command, state: State) -> Answer:
    """Return the policy's answer, checked against the state.

    Raises:
        Refusal: it names unknown blocks or takes more of a block than is left; see `Command.decide`.
    """
    answer = policy.decide(state)
    lost = {block.name: block.sparsity for block in state.blocks}
    if unknown := sorted(answer.prune.keys() - lost.keys()):
        names = list(lost)
        known = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
        raise Refusal(f"policy {policy.kind} names unknown blocks: {', '.join(unknown)}; allowed: {known}.")
    if over := [name for name, share in answer.prune.items() if lost[name] + share > 1 + SLACK]:
        excess = ", ".join(
            f"{answer.prune[name]:g} of {name}, which has lost {lost[name]:g}" for name in over
        )
        raise Refusal(
            f"policy {policy.kind} takes more than is left: {excess}; answer with at most 1 minus that."
        )
    return answer


def _mistakes(error: ValidationError) -> str:
    """Return what is wrong with an answer, field by field, in one line."""
    mistakes = error.errors(include_url=False)
    located = ((".".join(map(str, mistake["loc"])), mistake["msg"]) for mistake in mistakes)
    return "; ".join(f"{field}: {message}" if field else message for field, message in located)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else f"{line[:80]} ...") if line else "nothing"

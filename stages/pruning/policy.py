"""Who decides, step by step, which blocks lose how much: the interface, and the two policies there are.

A policy is shown the state of the work and answers with shares to take from blocks, or with the reason to
stop (2601.09694, where a language model decides). It sees no weights: of every block its sparsity and two
sensitivities, both z-scored over blocks, and of every step so far what was pruned, the perplexity that came
of it and whether it was kept. `Rules` decides by a rule. `Command` asks a program, which is how a language
model is plugged in: it gets a `State` as JSON on its standard input and says an `Answer` as JSON.

A program is an input that no hash stands for: answers that differ make another artifact of the same recipe.
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
"""What a share may exceed 1 by, as sums of decimal shares do."""


class Block(Strict):
    """A decoder block as a policy sees it."""

    name: str
    weights: int
    """How many there are in its linears."""
    sparsity: float
    wanda: float
    """The z-score of the mean |w| * norm of its input over the weights it has left."""
    gradient: float
    """The z-score of the mean |w * gradient| over the same."""


class Step(Strict):
    """What was done at an earlier step, and what came of it."""

    prune: dict[str, float]
    """The share of its weights that each block lost, by name; as applied, which may be less than asked."""
    sparsity: float
    """Of the whole model, after the step."""
    perplexity: float | None
    """On held-out windows, after the step; null where it was no finite number."""
    kept: bool
    """False where it was rolled back."""


class State(Strict):
    """All a policy knows."""

    target: float
    sparsity: float
    perplexity: float
    """Of the source."""
    max_rise: float
    steps_left: int
    blocks: tuple[Block, ...]
    history: tuple[Step, ...]


class Answer(Strict):
    """The share of its weights each block is to lose on top of what it lost, by its name; or why to stop."""

    prune: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    stop: str = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.prune) == bool(self.stop):
            raise ValueError("either prune names blocks or stop gives a reason")
        return self


class Rules(Strict):
    """The least sensitive blocks lose `step` each, which is halved after every step that was rolled back."""

    kind: Literal["rules"]
    step: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What a block loses at first."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of blocks that are pruned at a step, those whose two z-scores add up to least."""
    cap: Annotated[float, Field(gt=0, le=1)] = 0.9
    """No block loses more than this in all."""
    patience: Annotated[int, Field(ge=0)] = 4
    """Steps that may be rolled back before it gives up."""

    def decide(self, state: State) -> Answer:
        """A function of the state alone."""
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
        raise ValueError("allowed: any text without a NUL character, which no argument of a program can hold")
    return value


class Command(Strict):
    """A program that decides, run once a step in the project's folder, without a shell.

    It has a session of its own, which is killed as a whole when the answer is late: also what it started.
    """

    kind: Literal["command"]
    command: Annotated[
        tuple[Annotated[str, Field(min_length=1), AfterValidator(_argument)], ...], Field(min_length=1)
    ]
    """The program and its arguments."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds it may take to answer."""

    def decide(self, state: State) -> Answer:
        """What the program says.

        Raises:
            Refusal: it cannot be run, fails, takes too long, or says anything but an `Answer`.
        """
        name = f"policy command {self.command[0]}"
        try:
            code, out, err = self._run(state.model_dump_json())
        except subprocess.TimeoutExpired:
            raise Refusal(
                f"{name} did not answer within {self.timeout:g} seconds; raise policy.timeout or mend it."
            ) from None
        except OSError as error:
            raise Refusal(f"{name} cannot be run: {error.strerror}; mend policy.command.") from None
        if code:
            last = (err.strip().splitlines() or ["it said nothing on its standard error"])[-1]
            raise Refusal(f"{name} ended with exit code {code} ({last[:200].rstrip('.')}); mend it.")
        try:
            return Answer.model_validate_json(out)
        except ValidationError as error:
            wrong = "; ".join(
                ": ".join([*(".".join(map(str, one["loc"])),) * bool(one["loc"]), one["msg"]])
                for one in error.errors(include_url=False)
            )
            raise Refusal(
                f"{name} answered {_shown(out)}, which is no answer ({wrong}); it must be JSON like "
                '{"prune": {"<block>": 0.05}} or {"stop": "<reason>"}.'
            ) from None

    def _run(self, given: str) -> tuple[int, str, str]:
        """The program's exit code, standard output and standard error on `given` as standard input."""
        with subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace", start_new_session=True,
        ) as program:  # fmt: skip
            try:
                out, err = program.communicate(given, self.timeout)
            except BaseException:  # an interrupt, too: it does not reach another session by itself
                with suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
                raise
        return program.returncode, out, err


Policy = Annotated[Rules | Command, Field(discriminator="kind")]


def ask(policy: Rules | Command, state: State) -> Answer:
    """What the policy decides, held against the state.

    Raises:
        Refusal: it names blocks there are not or takes more from some than they have; see `Command.decide`.
    """
    answer = policy.decide(state)
    have = {block.name: block.sparsity for block in state.blocks}
    if unknown := sorted(answer.prune.keys() - have.keys()):
        raise Refusal(
            f"policy {policy.kind} names blocks there are not: {', '.join(unknown)}; {_known(have)}."
        )
    if over := [name for name, share in answer.prune.items() if have[name] + share > 1 + SLACK]:
        told = ", ".join(
            f"{answer.prune[name]:g} from {name}, which has lost {have[name]:g}" for name in over
        )
        raise Refusal(f"policy {policy.kind} takes more than there is: {told}.")
    return answer


def _known(names: dict[str, float]) -> str:
    listed = list(names)
    return f"there are {listed[0]} to {listed[-1]}" if len(listed) > 1 else f"there is {listed[0]}"


def _shown(text: str) -> str:
    folded = " ".join(text.split())
    return repr(folded if len(folded) <= 80 else f"{folded[:80]} ...") if folded else "nothing"

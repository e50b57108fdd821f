"""Speed of generation: the time to the first token, and the time of each later one.

Models are compared at equal lengths. Each row of a batch reads `prompt_tokens` random tokens and writes
exactly `new_tokens`, whatever they are: otherwise a model that ends its answers early would look fast. The
first runs are not counted, as they unpack packed weights and fill caches. Each counted run is a row of the
table; a figure is their median, with the quartiles beside it.

Arithmetic bounds reading the prompt, memory bounds writing, so the two are measured apart, and batches of one
apart from larger ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Source, Strict
from stages.model.positions import most_tokens
from stages.model.stepping import read_on

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NOTED = 0.05
"""Share of the processors' time taken by others above which a warning is logged and no times are compared."""
_PROC = Path("/proc/self")


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"{', '.join(repeated)} is listed twice; list it once")
    return values


class Profile(Strict):
    """Section `profile`: the models to measure, and the lengths and batches to measure them at."""

    candidates: tuple[Source, ...]
    """The models; with none, the other settings may be left out."""
    batch_sizes: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), AfterValidator(_distinct)
    ] = (1,)
    prompt_tokens: Annotated[int, Field(ge=1)] = 128
    new_tokens: Annotated[int, Field(ge=2)] = 32
    warmup: Annotated[int, Field(ge=1)] = 1
    """Runs before those that count, at each batch size."""
    repeats: Annotated[int, Field(ge=3)] = 5
    """Runs that count."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads; a profile is alone on the machine, so it may take more than `run.threads`."""
    minutes: Annotated[float, Field(gt=0)] = 10.0
    """The longest that the measurement of a candidate may take; no dependency, as it changes no figure."""

    @model_validator(mode="after")
    def _explicit(self) -> Self:
        """Refuse candidates beside a setting that is left out, for which DVC would look in vain."""
        dependencies = [key for key in type(self).model_fields if key != "minutes"]
        if self.candidates and (missing := [key for key in dependencies if key not in self.model_fields_set]):
            raise ValueError(f"profile has candidates, so it needs {', '.join(missing)} too")
        return self

    def check(self, model: PreTrainedModel, candidate: str) -> None:
        """Refuse a length that the model does not read.

        Raises:
            Refusal: prompt and new tokens are more than the model has positions.
        """
        longest = most_tokens(model.config)
        if longest and self.prompt_tokens + self.new_tokens > longest:
            raise Refusal(
                f"profile: prompt_tokens {self.prompt_tokens} and new_tokens {self.new_tokens} are more than "
                f"the {longest} positions of {candidate}; ask for fewer."
            )

    def prompts(self, batch_size: int, vocabulary: int, seed: int) -> Tensor:
        """Draw token ids `[batch_size, prompt_tokens]`, int64, on the CPU."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocabulary, (batch_size, self.prompt_tokens), generator=draw)

    def runs(self, generate: Callable[[], list[float]]) -> Iterator[dict[str, Any]]:
        """Yield a row for each counted run of `generate`: seconds to the first token, and per later token."""
        for number in range(self.repeats):
            clock = generate()
            yield {
                "repeat": number,
                "seconds_to_first_token": clock[0],
                "seconds_per_token": (clock[-1] - clock[0]) / (len(clock) - 1),
            }


def generate(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    tick: Callable[[], object] = lambda: None,
) -> list[float]:
    """Write `new_tokens` after `prompts` `[rows, tokens]`, greedily; return the seconds until each.

    Args:
        tick: called after each token.
    """
    clock = []
    ids, kept = prompts, dict[str, Any]()
    with torch.no_grad():
        _wait(prompts.device)
        start = time.perf_counter()
        for _ in range(new_tokens):
            logits, kept = read_on(model, ids, kept)
            ids = logits.argmax(-1, keepdim=True)
            _wait(prompts.device)
            clock.append(time.perf_counter() - start)
            tick()
    return clock


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the median, and the first and third quartile as `low` and `high`."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


class PeakMemory:
    """Peak memory since construction: of tensors on CUDA, of the whole process elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._reset = True
        else:
            self._reset = _reset_peak()

    def bytes(self) -> int | None:
        """Return the peak; None if this machine does not measure it, or cannot reset it after loading."""
        if not self._reset:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        (line,) = (line for line in (_PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def _reset_peak() -> bool:
    """Set the process's peak back to what is resident now; tell whether that worked."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _wait(device: torch.device) -> None:
    """Wait for CUDA, which returns before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Speed of generation: the time to the first token, and the time of each after it.

Models are compared at one length. Each row of a batch reads `prompt_tokens` drawn at random and writes
exactly `new_tokens`, whatever it says: a model that ends its answers early would otherwise look fast. The
first runs are not counted (packed weights are unpacked then, and caches filled), the rest are, each a
row of the table; a figure is their median, with the quartiles beside it.

Reading the prompt is bound by arithmetic and writing by memory, so that the two are told apart, and
batches of one from larger ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Source, Strict

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROC = Path("/proc/self")


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if again := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"{', '.join(again)} is listed twice; list it once")
    return values


class Profile(Strict):
    """Which models are measured, and at what."""

    candidates: tuple[Source, ...]
    batch_sizes: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), AfterValidator(_once)
    ]
    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Annotated[int, Field(ge=2)]
    warmup: Annotated[int, Field(ge=1)]
    """Runs that are not counted, before those of each batch size."""
    repeats: Annotated[int, Field(ge=3)]
    """Runs that are."""
    threads: Annotated[int, Field(ge=1)]
    """CPU threads: a profile is alone on the machine, so it may take more than `run.threads`."""

    def check(self, model: PreTrainedModel, candidate: str) -> None:
        """Refuse a length that the model does not read.

        Raises:
            Refusal: the prompt and what follows are longer than the model's positions.
        """
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest and self.prompt_tokens + self.new_tokens > longest:
            raise Refusal(
                f"profile: prompt_tokens {self.prompt_tokens} and new_tokens {self.new_tokens} are more than "
                f"the {longest} positions of {candidate}; ask for fewer."
            )

    def prompts(self, batch_size: int, vocabulary: int, seed: int) -> Tensor:
        """`[batch_size, prompt_tokens]` ids drawn from `seed`, int64, on the CPU."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocabulary, (batch_size, self.prompt_tokens), generator=draw)

    def runs(self, generate: Callable[[], list[float]]) -> Iterator[dict[str, Any]]:
        """One row a counted run of `generate`: the seconds to the first token, and of each later one."""
        for number in range(self.repeats):
            clock = generate()
            yield {
                "repeat": number,
                "seconds_to_first_token": clock[0],
                "seconds_per_token": (clock[-1] - clock[0]) / (len(clock) - 1),
            }


def generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> list[float]:
    """Write `new_tokens` after `prompts` `[rows, tokens]`, greedily; the seconds at which each was there."""
    clock = []
    ids, cache = prompts, None
    with torch.no_grad():
        _wait(prompts.device)
        start = time.perf_counter()
        for _ in range(new_tokens):
            told = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = told.logits[:, -1:].argmax(-1), told.past_key_values
            _wait(prompts.device)
            clock.append(time.perf_counter() - start)
    return clock


def quartiles(values: list[float]) -> dict[str, float]:
    """The median of three or more values, and their first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


class Peak:
    """Peak memory from here on: of tensors on CUDA, resident memory of the process elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._reset = True
        else:
            self._reset = _forget_peak()

    def bytes(self) -> int | None:
        """None where this machine does not tell it, or cannot forget what loading took."""
        if not self._reset:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        (line,) = (line for line in (PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def _forget_peak() -> bool:
    try:
        (PROC / "clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    except OSError:
        return False
    return True


def _wait(device: torch.device) -> None:
    """CUDA returns before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Measure one candidate: time, memory and energy of generation, and how much of the machine others took.

The model is loaded as whoever serves its checkpoint with transformers loads it. The record says which modules
then multiply with which weights: transformers may unpack a packed checkpoint as it loads it, and such a
model is as fast as a dense one.

A figure measured beside other work is wrong, so nothing is stored if others took more than a fifth of the
processors. Each run is compared by itself, so a disturbed measurement ends soon.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.files import PROFILES, write_json, writing
from stages.core.lazy import pd, torch
from stages.core.run import Run
from stages.model import artifact
from stages.profiling.energy import Meter
from stages.profiling.speed import NOTED, PeakMemory, Profile, generate, quartiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
DISTURBED = 0.2
"""Share of the processors' time taken by others above which nothing is stored."""


def measure_candidate(settings: Profile, run: Run, name: str) -> None:
    """Measure candidate `name` into data/profile/<name>: `profile.json`, and `repeats.parquet` run by run.

    Raises:
        Refusal: others took more than `DISTURBED` of the processors, or it took longer than
            `settings.minutes`; nothing is stored.
    """
    run = run.model_copy(update={"threads": settings.threads})
    device = run.start()
    model = artifact.load_model(name, run, dequantize=False)
    settings.check(model, name)
    record = artifact.load_record(name)
    rows: list[dict[str, Any]] = []
    batches: list[dict[str, Any]] = []
    turns = len(settings.batch_sizes) * (settings.warmup + settings.repeats)
    end = time.monotonic() + 60 * settings.minutes
    bar = tqdm(total=turns * settings.new_tokens, desc=f"profile {name}", unit="token")
    for batch_size in settings.batch_sizes:
        prompts = settings.prompts(batch_size, model.config.vocab_size, run.seed).to(device)

        def tick(batch_size: int = batch_size) -> None:
            bar.update()
            if time.monotonic() > end:
                raise Refusal(
                    f"batch size {batch_size} is not measured after profile.minutes, {settings.minutes:g}, "
                    "and nothing is stored; raise it, or lower batch_sizes, new_tokens or repeats."
                )

        def once(prompts: Any = prompts, tick: Any = tick) -> list[float]:
            others = Others()
            clock = generate(model, prompts, settings.new_tokens, tick)
            if clock[-1] > 1:  # the system counts in hundredths of a second
                refuse_disturbed(others.share())
            return clock

        for _ in range(settings.warmup):
            once()
        peak, meter, others = PeakMemory(device), Meter(device), Others()
        runs = list(settings.runs(once))
        joules, busy = meter.joules(), others.share()
        refuse_disturbed(busy)
        if busy > NOTED:
            log.warning("other processes took %.0f %% of the processors; measure it again", 100 * busy)
        rows += [{"candidate": name, "batch_size": batch_size, **row} for row in runs]
        first, later = (
            quartiles([row[figure] for row in runs])
            for figure in ("seconds_to_first_token", "seconds_per_token")
        )
        tokens = settings.repeats * settings.new_tokens * batch_size
        batches.append(
            {
                "batch_size": batch_size,
                "seconds_to_first_token": first,
                "seconds_per_token": later,
                "tokens_per_second": batch_size / later["median"],
                "peak_bytes": peak.bytes(),
                "joules_per_token": joules and joules / tokens,
                "energy": meter.source,
                "others_busy": round(busy, 3),
            }
        )
    bar.close()
    with writing(PROFILES / name) as folder:
        pd.DataFrame(rows).to_parquet(folder / "repeats.parquet", index=False)
        facts = {
            "candidate": name,
            "bytes_on_disk": record["bytes_on_disk"],
            "bytes_ideal": record["bytes_ideal"],
            "num_parameters": record["num_parameters"],
            **settings.model_dump(mode="json", exclude={"candidates", "batch_sizes", "minutes"}),
            **run.arithmetic(),
            "kernels": kernels(model),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "processor": processor(),
            "cores": psutil.cpu_count(),
            "batches": batches,
        }
        write_json(folder / "profile.json", facts)


def refuse_disturbed(busy: float) -> None:
    """Refuse a measurement beside which others took the share `busy` of the processors' time.

    Raises:
        Refusal: that is more than `DISTURBED`.
    """
    if busy > DISTURBED:
        raise Refusal(
            f"other processes took {100 * busy:.0f} % of the processors, more than {100 * DISTURBED:.0f} %, "
            "so nothing is stored; run `prunequant run profile` when the machine is idle."
        )


def kernels(model: PreTrainedModel) -> dict[str, int]:
    """Count the matrices of a model by the module that multiplies with them and the weights that it holds."""
    counts = Counter[str]()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "weight_packed", None) is not None and weight is None:
            counts[f"{type(module).__name__} on packed weights, unpacked at each call"] += 1
        elif weight is not None and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding):
            counts[f"{type(module).__name__} on dense {str(weight.dtype).removeprefix('torch.')}"] += 1
    return dict(counts)


def processor() -> str:
    """Return the processor's name, as far as the system knows it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Others:
    """The share of the processors' time that other processes have taken since construction."""

    def __init__(self) -> None:
        self._start = self._times()

    def share(self) -> float:
        """Return the share so far, in [0, 1]."""
        clock, busy, own = (now - then for now, then in zip(self._times(), self._start, strict=True))
        return min(1.0, max(0.0, (busy - own) / (clock * (psutil.cpu_count() or 1))))

    def _times(self) -> tuple[float, float, float]:
        """Return the seconds of the clock, of all work on the machine, and of this process's work."""
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        # Where a system counts guests, their time is part of user's.
        busy = sum(machine) - idle - getattr(machine, "guest", 0.0) - getattr(machine, "guest_nice", 0.0)
        return time.monotonic(), busy, own.user + own.system

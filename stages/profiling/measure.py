"""Measure one candidate: time, memory and energy of generation, and how much of the machine others took."""

from __future__ import annotations

import logging
import platform
import time
from pathlib import Path
from typing import Any

import psutil

from stages.core.files import PROFILES, write_json, writing
from stages.core.lazy import pd
from stages.core.run import Run
from stages.model import artifact
from stages.profiling.energy import Meter
from stages.profiling.speed import PeakMemory, Profile, generate, quartiles

_BUSY = 0.05
"""Share of the processors' time taken by others above which a warning is logged."""

log = logging.getLogger(__name__)


def measure_candidate(settings: Profile, run: Run, name: str) -> None:
    """Measure candidate `name` into data/profile/<name>: `profile.json`, and `repeats.parquet` run by run."""
    run = run.model_copy(update={"threads": settings.threads})
    device = run.start()
    model = artifact.load_model(name, run, dequantize=False)
    settings.check(model, name)
    record = artifact.load_record(name)
    rows: list[dict[str, Any]] = []
    batches: list[dict[str, Any]] = []
    for batch_size in settings.batch_sizes:
        prompts = settings.prompts(batch_size, model.config.vocab_size, run.seed).to(device)

        def once(prompts: Any = prompts) -> list[float]:
            return generate(model, prompts, settings.new_tokens)

        for _ in range(settings.warmup):
            once()
        peak, meter, others = PeakMemory(device), Meter(device), Others()
        runs = list(settings.runs(once))
        joules, busy = meter.joules(), others.share()
        if busy > _BUSY:
            log.warning("%s: other processes took %.0f %% of the machine; measure it again", name, 100 * busy)
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
    with writing(PROFILES / name) as folder:
        pd.DataFrame(rows).to_parquet(folder / "repeats.parquet", index=False)
        facts = {
            "candidate": name,
            "bytes_on_disk": record["bytes_on_disk"],
            "bytes_ideal": record["bytes_ideal"],
            "num_parameters": record["num_parameters"],
            **settings.model_dump(mode="json", exclude={"candidates", "batch_sizes"}),
            **run.arithmetic(),
            "processor": processor(),
            "cores": psutil.cpu_count(),
            "batches": batches,
        }
        write_json(folder / "profile.json", facts)


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

"""Measuring one candidate: time, memory and energy of generation, and how much of the machine others took."""

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
from stages.profiling.speed import Peak, Profile, generate, quartiles

BUSY = 0.05
"""Share of the processors' time taken by others above which it is said."""

log = logging.getLogger(__name__)


def measure(wanted: Profile, settings: Run, name: str) -> None:
    """Measure candidate `name` into data/profile/<name>: `profile.json`, and `repeats.parquet` run by run."""
    settings = settings.model_copy(update={"threads": wanted.threads})
    device = settings.start()
    model = artifact.load_model(name, settings, dequantize=False)
    wanted.check(model, name)
    record = artifact.load_record(name)
    rows: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    for batch_size in wanted.batch_sizes:
        prompts = wanted.prompts(batch_size, model.config.vocab_size, settings.seed).to(device)

        def once(prompts: Any = prompts) -> list[float]:
            return generate(model, prompts, wanted.new_tokens)

        for _ in range(wanted.warmup):
            once()
        peak, meter, others = Peak(device), Meter(device), Others()
        found = list(wanted.runs(once))
        joules, busy = meter.joules(), others.share()
        if busy > BUSY:
            log.warning("%s: others took %.0f %% of the machine meanwhile; measure again", name, 100 * busy)
        rows += [{"candidate": name, "batch_size": batch_size, **row} for row in found]
        first, each = (
            quartiles([row[figure] for row in found])
            for figure in ("seconds_to_first_token", "seconds_per_token")
        )
        summary.append(
            {
                "batch_size": batch_size,
                "seconds_to_first_token": first,
                "seconds_per_token": each,
                "tokens_per_second": batch_size / each["median"],
                "peak_bytes": peak.bytes(),
                "joules_per_token": joules and joules / (wanted.repeats * wanted.new_tokens * batch_size),
                "energy": meter.source,
                "others_busy": round(busy, 3),
            }
        )
    with writing(PROFILES / name) as folder:
        pd.DataFrame(rows).to_parquet(folder / "repeats.parquet", index=False)
        about = {
            "candidate": name,
            "bytes_on_disk": record["bytes_on_disk"],
            "bytes_ideal": record["bytes_ideal"],
            "num_parameters": record["num_parameters"],
            **wanted.model_dump(mode="json", exclude={"candidates", "batch_sizes"}),
            **settings.numerics(),
            "processor": processor(),
            "cores": psutil.cpu_count(),
            "batches": summary,
        }
        write_json(folder / "profile.json", about)


def processor() -> str:
    """The processor's name, as far as the machine tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Others:
    """The share of the processors' time that other processes take from here on."""

    def __init__(self) -> None:
        self._start = self._times()

    def share(self) -> float:
        """In [0, 1]."""
        clock, busy, own = (now - then for now, then in zip(self._times(), self._start, strict=True))
        return min(1.0, max(0.0, (busy - own) / (clock * (psutil.cpu_count() or 1))))

    def _times(self) -> tuple[float, float, float]:
        machine, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        # A guest's time is part of user's, where there is one.
        busy = sum(machine) - idle - getattr(machine, "guest", 0.0) - getattr(machine, "guest_nice", 0.0)
        return time.monotonic(), busy, mine.user + mine.system

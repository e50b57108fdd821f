"""Profile: measure one candidate's speed, memory and energy, alone on the machine.

Measurements vary from run to run, so they lie in data/profile/<candidate>, apart from results. Only the
report reads them, and keeps them apart from scores. Whether the machine was free is measured too: the share
of its processors' time that others took; beside much other work nothing is stored.
"""

import os

from stages.core.run import Run
from stages.job.entry import entry
from stages.profiling.measure import measure_candidate
from stages.profiling.speed import Profile


def profile(settings: Profile, run: Run, name: str) -> None:
    """Measure candidate `name` into data/profile/<name>: `profile.json`, and `repeats.parquet` run by run."""
    measure_candidate(settings, run, name)


if __name__ == "__main__":
    # Threads that wait leave the processors to others; spinning, they starve each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    entry(profile)

"""The run record `data/runs/<stage>/<recipe>.json`: everything about a run that varies from run to run.

Times, host, versions, commit and peak memory are here and not in artifacts, so that equal inputs give equal
bytes.
"""

import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from stages.core import identity
from stages.core.files import run_record, write_json
from stages.job.transient import passing


@contextmanager
def recorded(stage: str, name: str) -> Iterator[None]:
    """Write the record when the body ends: how it ended, when, how long it took, on what."""
    started, clock, commit = datetime.now(UTC), time.monotonic(), _commit()
    state, reason, cause = "done", None, None
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        state, reason = "failed", "ended by a signal before it was done; run it again to continue."
        raise
    except BaseException as error:
        state, reason, cause = "failed", str(error) or type(error).__name__, passing(error)
        raise
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        write_json(
            run_record(stage, name),
            {
                "state": state,
                "error": reason,
                "passing": cause,  # what may be over when the stage runs again, see `passing`
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 2),
                "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),  # of the whole process, imports too
                "peak_gib": round(used.ru_maxrss / 2**20, 3),
                "host": platform.node(),
                "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
                "cuda_visible_devices": os.getenv("CUDA_VISIBLE_DEVICES"),
                "commit": commit,
                "python": platform.python_version(),
                "versions": identity.versions(),
            },
        )


def _commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

"""What surrounds a stage's work: the device, determinism, the run record, and how a failure is told.

`entry` is the whole of a stage's `__main__`: it validates all of params.yaml, does the work and leaves a
run record in `data/runs/<stage>/<recipe>.json`. The record holds what varies from run to run (times,
host, versions, commit, peak memory); artifacts hold only what does not, so that equal inputs give equal
bytes. A refusal is told in its own words with exit code 2 and no traceback.
"""

import argparse
import errno
import importlib.metadata
import logging
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from stages.core.atomic import write_json
from stages.core.errors import Refusal
from stages.core.memory import keep_freed
from stages.core.schema import Seed, Strict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stages.core.params import Params

RUNS = Path("data/runs")
RECORDED = ("torch", "transformers", "lm-eval", "compressed-tensors", "peft", "datasets", "dvc", "prefect")


def _device(value: str) -> str:
    if value == "auto":
        return value
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", value):
        raise ValueError("allowed: auto, cpu, cuda, cuda:<index>, mps or xpu")
    return value


Dtype = Literal["bfloat16", "float16", "float32"]


class Run(Strict):
    """The one choice of device and number type, and what else every computation depends on."""

    device: Annotated[str, AfterValidator(_device)]
    """Where tensors live; `auto` takes CUDA where there is one. Recorded, not a dependency."""
    dtype: Dtype
    """The dtype models are loaded, computed and written in."""
    threads: Annotated[int, Field(ge=1)]
    """CPU threads of each stage."""
    seed: Seed
    """Seeds every random draw that a recipe does not seed itself."""

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def resolved_device(self) -> torch.device:
        """The device asked for.

        Raises:
            Refusal: this machine has no such device.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        if device.type != "cpu":
            backend = getattr(torch, device.type, None) or getattr(torch.backends, device.type, None)
            if backend is None or not backend.is_available():
                raise Refusal(
                    f"run.device: {self.device} was asked for and this machine has none; use cpu or auto."
                )
        return device

    def start(self) -> torch.device:
        """Fix threads, seeds and every switch that changes results, and return the device."""
        keep_freed()
        # cuBLAS reads this when it starts: without it deterministic algorithms are refused on CUDA.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device = self.resolved_device()
        torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        # The same switch as use_deterministic_algorithms, which also imports the compiler: a second a stage.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        if device.type == "cuda":
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_math_sdp(True)
        return device

    def numerics(self) -> dict[str, Any]:
        """What the bytes of a computed artifact depend on beside its inputs; constant on one machine."""
        device = self.resolved_device()
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": self.threads,
            "dtype": self.dtype,
            "torch": str(torch.__version__),
        }


def entry(
    stage: str,
    work: "Callable[[Params, str], None]",
    recipes: "Callable[[Params], list[str]] | None" = None,
) -> None:
    """Run one stage for one recipe from the command line, `python -m stages.<stage> <recipe>`.

    Args:
        work: does it; raises `Refusal` for what the user can mend.
        recipes: the names this stage knows under the given params; None for a stage that takes none.
    """
    from stages.core.params import load

    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}", description=work.__doc__)
    if recipes is not None:
        parser.add_argument("recipe", help="a name from params.yaml")
    # Without a handler SIGTERM ends Python on the spot: no clean-up of what is half written, no record.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    name = getattr(parser.parse_args(), "recipe", "all")
    _logging()
    try:
        params = load()
        if recipes is not None and name not in (known := recipes(params)):
            raise Refusal(f"there is no recipe of this name; params.yaml has {', '.join(known) or 'none'}.")
        if missing := params.unmade(stage, name):
            raise Refusal(f"nothing was run, for {'; '.join(missing)}.")
        with recorded(stage, name):
            work(params, name)
    except Exception as error:
        if isinstance(error, Refusal):
            told = str(error)
        elif _without_room(error):
            told = (
                f"no space is left on the disk of {Path.cwd()}; free some (dvc gc --workspace drops what no "
                "recipe needs any more) and run it again."
            )
        else:
            raise
        print(f"{stage} {name}: {told}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def _without_room(error: Exception) -> bool:
    """Whether a write found the disk or a quota full; safetensors and tokenizers say it in words alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {code})" in str(error) for code in full)


@contextmanager
def recorded(stage: str, name: str) -> "Iterator[None]":
    """Write `data/runs/<stage>/<name>.json`: how the work ended, when, how long, on what."""
    started, clock = datetime.now(UTC), time.monotonic()
    state, error = "done", None
    try:
        yield
    except BaseException as raised:
        state, error = "failed", str(raised) or type(raised).__name__
        raise
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        write_json(
            RUNS / stage / f"{name}.json",
            {
                "state": state,
                "error": error,
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 2),
                "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),  # of the whole process, imports too
                "peak_gib": round(used.ru_maxrss / 2**20, 3),
                "host": platform.node(),
                "commit": _commit(),
                "python": platform.python_version(),
                "versions": {package: importlib.metadata.version(package) for package in RECORDED},
            },
        )


def _commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _logging() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for chatty in ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "lm_eval"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

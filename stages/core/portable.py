"""Kernels that are the same on many processors, so that equal inputs give equal bytes on all of them.

torch, MKL, oneDNN and OpenBLAS choose kernels by what the processor can do, and each kernel sums in an order
of its own. With `run.numerics: portable` all four are held at AVX2, in fp32. They read switches from the
environment as they load, so a stage sets them and starts again in the same process before torch is loaded.
They are honoured on x86 processors of Intel with AVX2; MKL ignores its switch on those of other makers.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

from stages.core.lazy import torch

SWITCHES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
_MKL_BRANCH, _MKL_AVX2 = 1, 10
"""MKL_CBWR_BRANCH and MKL_CBWR_AVX2 of mkl_types.h."""


def hold_kernels() -> None:
    """Start this process again with every switch set, unless it runs with them already."""
    if any(os.environ.get(name) != value for name, value in SWITCHES.items()):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SWITCHES})


def ignored_switch() -> str:
    """Return which switch does not work in this process, and why; empty if all do."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"ATEN_CPU_CAPABILITY, as this processor is {platform.machine()} and not x86"
    for name, value in SWITCHES.items():
        if os.environ.get(name) != value:
            return f"{name}, which is {os.environ.get(name, 'not set')} in place of {value}"
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        return f"ATEN_CPU_CAPABILITY, as torch computes with {capability} (has this processor AVX2?)"
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    branch = getattr(library, "mkl_serv_cbwr_get", None)
    if branch is None:
        return "MKL_CBWR, as this torch was built without MKL"
    if branch(_MKL_BRANCH) != _MKL_AVX2:
        return "MKL_CBWR, as MKL heeds it on processors of Intel alone"
    return ""

"""Memory that tensors free stays with the process, to be taken again.

glibc returns a large block to the system as soon as it is freed, and the free end of its heap too, and asks
for new memory the next time, of which the system must clear every page before it is used. Layers and training
steps free and take the same megabytes over and over, so that on a CPU this is a good part of their time.

A training holds all of its model, and takes its largest blocks again at every step. A model of `LARGE` bytes
that is streamed block by block has few large tensors beside much else to do, and must not be left with holes
of their size, which differ from block to block and so add up: there what is freed is returned at once, but
for `SMALL` pieces, and before every block what lies free between pieces that are held, too (`python -m
benchmarks.memory` prints the peak of few and of many blocks).
"""

import ctypes
import sys
from typing import Any

STREAMED = 32 * 2**20
"""Bytes from which on a block goes back to the system, where not all of a model may be in memory."""
SMALL = 4 * 2**20
"""The same where its model is `LARGE`."""
TRAINED = 2**30
"""The same of a training."""
LARGE = 2 * 2**30
"""Bytes of a streamed model's weights from which on what is freed is returned."""
NEVER = -1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed(below: int = STREAMED, trim: int = NEVER) -> bool:
    """Keep freed blocks of less than `below` bytes, and the heap's free end where it has less than `trim`.

    Returns:
        Whether this machine's C library can be told so; glibc can.
    """
    mallopt = _glibc("mallopt")
    told = ((M_MMAP_THRESHOLD, below), (M_TRIM_THRESHOLD, trim))
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in told)


def give_back() -> None:
    """Return whatever is free to the system, also between pieces that are held; where the C library can."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def _glibc(name: str) -> Any:
    """A function of glibc; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None

"""Memory that tensors free stays with the process, to be taken again.

glibc returns a large block to the system as soon as it is freed and asks for a new one the next time, of
which the system must clear every page before it is used. Layers and training steps free and take the same
megabytes over and over, so that on a CPU this is a good part of their time. Larger blocks are still
returned: there are few of them, and a model that is streamed block by block must not be left with holes of
their size. A training holds all of its model, and takes its largest blocks again at every step.
"""

import ctypes
import sys

STREAMED = 32 * 2**20
"""Bytes from which on a block goes back to the system, where not all of a model may be in memory."""
TRAINED = 2**30
"""The same of a training."""
NEVER = -1
"""For the free memory at the end of the heap, which would otherwise be returned too."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed(below: int = STREAMED) -> bool:
    """Keep freed blocks of less than `below` bytes; returns whether the C library can be told (glibc can)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    told = ((M_MMAP_THRESHOLD, below), (M_TRIM_THRESHOLD, NEVER))
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in told)

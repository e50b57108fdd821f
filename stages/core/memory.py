"""Memory that tensors free stays with the process, to be taken again.

glibc returns a large block to the system as soon as it is freed and asks for a new one the next time, of
which the system must clear every page before it is used. Layers and training steps free and take the same
megabytes over and over, so that on a CPU this is a good part of their time. Blocks above `RETURNED` are still
returned: there are few of them, and a model that is streamed block by block must not be left with holes
of their size.
"""

import ctypes
import sys

RETURNED = 32 * 2**20
"""Bytes from which on a block of memory goes back to the system when it is freed."""
NEVER = -1
"""For the free memory at the end of the heap, which would otherwise be returned too."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed() -> bool:
    """Keep what is freed; returns whether this machine's C library can be told so (glibc can)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    told = ((M_MMAP_THRESHOLD, RETURNED), (M_TRIM_THRESHOLD, NEVER))
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in told)

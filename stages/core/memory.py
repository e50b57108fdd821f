"""Memory that tensors free stays with the process, to be taken again.

glibc returns a large block to the system as soon as it is freed, and the free end of its heap too, and asks
for new memory the next time, of which the system must clear every page before it is used. Layers and training
steps free and take the same megabytes over and over, so that on a CPU this is a good part of their time.

A training holds all of its model, and takes its largest blocks again at every step. A model beyond `LARGE`
that is streamed block by block has few large tensors beside much else to do. There all but pieces below
`SMALL` goes back at once, from before its modules are made: each makes a weight and gives it up again, and
with many blocks they would leave a heap of holes, which the work on blocks fills bit by bit (`python -m
benchmarks.memory` prints the peak of few and of many blocks).
"""

import ctypes
import errno
import sys

STREAMED = 32 * 2**20
"""Bytes from which on a block goes back to the system, where not all of a model may be in memory."""
SMALL = 2**20
"""The same where a model is made, and from then on where it is beyond `LARGE`."""
TRAINED = 2**30
"""The same of a training."""
LARGE = 2 * 2**30
"""Bytes of a streamed model's weights up to which freed memory is kept."""
NEVER = -1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed(below: int = STREAMED, trim: int = NEVER) -> bool:
    """Keep freed blocks of less than `below` bytes, and the heap's free end where it has less than `trim`.

    Returns:
        Whether this machine's C library can be told so; glibc can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    told = ((M_MMAP_THRESHOLD, below), (M_TRIM_THRESHOLD, trim))
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in told)


def exhausted(error: Exception) -> bool:
    """Whether an error says that memory does not suffice, on whatever device."""
    from torch import OutOfMemoryError

    # On a CPU torch raises nothing more particular than a RuntimeError; safetensors tells errno in words.
    said = ("CPUAllocator", f"(os error {errno.ENOMEM})")
    return (
        isinstance(error, MemoryError | OutOfMemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(words in str(error) for words in said)
    )

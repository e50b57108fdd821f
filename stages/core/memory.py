"""Keep freed memory in the process so it can be reused.

glibc returns a large block to the system as soon as it is freed, and the free end of its heap as well. The
next request gets new memory, of which the system must clear every page first. Layers and training steps free
and request the same megabytes over and over, so on a CPU this is a good part of their time.

How much to keep depends on the work. A training holds its whole model and requests its largest blocks again
at every step. A model beyond `LARGE` that is streamed block by block has few large tensors beside much other
work. There, everything of `SMALL` bytes or more is returned at once. This is set before the modules are
created, because each one allocates a weight and drops it; with many blocks that would leave a fragmented heap
(`python -m benchmarks.memory` prints the peak for few and for many blocks).
"""

import ctypes
import errno
import sys

STREAMED = 32 * 2**20
"""Bytes from which a freed block goes back to the system while a model is streamed."""
SMALL = 2**20
"""The threshold while modules are created, and throughout for a model larger than `LARGE`."""
TRAINED = 2**30
"""The threshold in training."""
LARGE = 2 * 2**30
"""Bytes of a streamed model's weights up to which freed memory is kept."""
NEVER = -1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed(below: int = STREAMED, trim: int = NEVER) -> bool:
    """Keep freed blocks of less than `below` bytes, and the heap's free end if it has less than `trim`.

    Returns:
        Whether this machine's C library supports it, as glibc does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    options = ((M_MMAP_THRESHOLD, below), (M_TRIM_THRESHOLD, trim))
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in options)


def cures(error: Exception, *settings: str) -> str:
    """Return what to do about an error that memory ran out by: change `settings`, or torch's allocator.

    torch names its setting where much of a card's memory is in pieces too small to be used.
    """
    last = ["set PYTORCH_ALLOC_CONF=expandable_segments:True"] if "expandable_segments" in str(error) else []
    return " or ".join([*settings, *last])


def exhausted(error: Exception) -> bool:
    """Tell whether an error means that memory ran out, on whatever device."""
    from torch import OutOfMemoryError

    # On a CPU torch raises a plain RuntimeError; safetensors gives errno in words.
    words = ("CPUAllocator", f"(os error {errno.ENOMEM})")
    return (
        isinstance(error, MemoryError | OutOfMemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(word in str(error) for word in words)
    )

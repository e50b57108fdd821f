"""A full disk is known by its errors and by the words of commands."""

import errno

from stages.core import disk


def test_words_for_a_full_disk():
    words = (
        "[Errno 28] No space left on device",
        "IoError: (os error 28)",
        "[Errno 122] Disk quota exceeded",
    )
    assert all(map(disk.is_full, words))
    assert disk.is_full(disk.full())
    assert not disk.is_full("[Errno 2] No such file; 28 left")


def test_errors_of_a_full_disk():
    assert disk.is_full(OSError(errno.ENOSPC, "x")) and disk.is_full(OSError(errno.EDQUOT, "x"))
    assert disk.is_full(Exception("Error while serializing: (os error 28)"))
    assert not disk.is_full(OSError(errno.EIO, "no space left"))

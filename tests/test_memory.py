"""What is freed stays with the process."""

import ctypes
import subprocess
import sys

import pytest

from stages.core import memory
from tests import project

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
FAULTS = """
import resource, sys
import torch
from stages.core.memory import keep_freed
if sys.argv[1] == "keep":
    assert keep_freed()
before = 0
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(24 * 2**20, dtype=torch.uint8) for _ in range(10)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_memory_that_was_freed_is_taken_again_without_the_system():
    found = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how],
                env={**project.ENV, "PYTHONPATH": str(project.ROOT)},
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for how in ("keep", "leave")
    }  # fmt: skip
    assert 10 * found["keep"] < found["leave"]


def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed() is False

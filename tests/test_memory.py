"""What is freed stays with the process."""

import ctypes
import os
import subprocess
import sys
from functools import partial

import pytest

from stages.core import memory
from stages.core.blocks import blocks
from stages.core.source import Empty
from tests import project
from tests.pipeline import do, params

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
FAULTS = """
import resource, sys
import torch
from stages.core.memory import TRAINED, keep_freed
if sys.argv[1] == "keep":
    assert keep_freed(below=TRAINED)
for turn in range(110):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20, dtype=torch.uint8)  # more than glibc would ever keep
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

HOLES = """
from pathlib import Path
import torch
from stages.core.memory import give_back, keep_freed
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])  # pages
keep_freed()
held = [torch.ones(2**20, dtype=torch.uint8) for _ in range(200)]
del held[::2]
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_holes_between_what_is_held_are_given_back():
    env = {**project.ENV, "PYTHONPATH": str(project.ROOT)}
    done = subprocess.run([sys.executable, "-c", HOLES], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) * os.sysconf("SC_PAGE_SIZE") > 90 * 2**20


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_memory_that_was_freed_is_taken_again_without_the_system():
    env = {**project.ENV, "PYTHONPATH": str(project.ROOT)}
    found = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], env=env, capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("keep", "leave")
    }
    assert 10 * found["keep"] < found["leave"]


def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed() is False
    memory.give_back()


@pytest.mark.parametrize(
    ("large", "expected"), [(1, [{"below": memory.SMALL, "trim": memory.SMALL}]), (memory.LARGE, [])]
)
def test_where_a_large_model_is_streamed_memory_is_returned(large, expected, workspace, monkeypatch):
    chosen = params("llama", {})
    do(chosen)
    told: list[dict[str, int]] = []
    monkeypatch.setattr(memory, "LARGE", large)
    monkeypatch.setattr(memory, "keep_freed", lambda **options: told.append(options) or True)
    source = Empty("base/tiny", chosen.run)
    assert told == expected
    given: list[str] = []
    for name, block in blocks(source.model):
        monkeypatch.setattr(memory, "give_back", partial(given.append, name))
        with source.block(name, block):
            pass
    assert given == (["model.layers.0", "model.layers.1"] if expected else [])

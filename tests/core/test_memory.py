"""What is freed stays with the process."""

import ctypes
import errno
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from stages.core import memory
from stages.core.errors import Unreadable
from stages.core.reading import reading
from stages.model.source import Empty
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


@pytest.mark.drill
@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_memory_that_was_freed_is_taken_again_without_the_system():
    env = {**project.ENV, **project.importing(project.ROOT)}
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], env=env, capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("keep", "leave")
    }
    assert 10 * faults["keep"] < faults["leave"]


def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed() is False


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_memory_that_does_not_suffice_is_no_damage(error, expected):
    assert memory.exhausted(error) is expected
    with pytest.raises(type(error) if expected else Unreadable), reading("base/tiny"):
        raise error


SMALL = {"below": memory.SMALL, "trim": memory.SMALL}


@pytest.mark.parametrize(("large", "expected"), [(1, [SMALL]), (memory.LARGE, [SMALL, {}])])
def test_where_a_large_model_is_streamed_memory_is_returned(large, expected, workspace, monkeypatch):
    chosen = params("llama", {})
    do(chosen)
    calls: list[dict[str, int]] = []
    monkeypatch.setattr(memory, "LARGE", large)
    monkeypatch.setattr(memory, "keep_freed", lambda **options: calls.append(options) or True)
    Empty("base/tiny", chosen.run)
    assert calls == expected


HOLES = """
import ctypes
from pathlib import Path
from transformers import LlamaConfig
from stages.core.run import Run
from stages.model.source import Empty

class Mallinfo(ctypes.Structure):
    _fields_ = [(f"unused{number}", ctypes.c_size_t) for number in range(8)]
    _fields_ += [("free", ctypes.c_size_t), ("top", ctypes.c_size_t)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
LlamaConfig(
    hidden_size=4096, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=64
).save_pretrained("data/models/base/wide")
run = Run(device="cpu", dtype="bfloat16", threads=1, seed=0, numerics="fast")
run.start()
source = Empty("base/wide", run)
assert sum(one.numel() for one in source.model.parameters()) > 2**31
print(mallinfo().free)
"""


@pytest.mark.drill
@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_a_model_made_without_weights_leaves_no_heap_of_holes(tmp_path):
    """Its 32 projections of keys and values, 8 MiB each, are below `STREAMED`."""
    env = {**project.ENV, **project.importing(project.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HOLES], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 * 2**20


def test_torchs_advice_on_a_card_in_pieces_is_passed_on():
    pieces = (
        "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
    )
    plain, fragmented = memory.cures(MemoryError(), "a", "b"), memory.cures(MemoryError(pieces), "a", "b")
    assert plain == "a or b"
    assert fragmented == "a or b or set PYTORCH_ALLOC_CONF=expandable_segments:True"

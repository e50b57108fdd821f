"""dvc.lock is read whole, while another process writes it."""

import threading
import time
from pathlib import Path

import pytest

from stages.job import locked

ENTRY = (
    "  {name}:\n    cmd: make\n    deps:\n    - path: x\n      md5: '1'\n"
    "    outs:\n    - path: {name}.txt\n      md5: abc\n"
)
FULL = "schema: '2.0'\nstages:\n" + "".join(ENTRY.format(name=name) for name in "abc")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_later(text, seconds=0.3):
    threading.Timer(seconds, Path("dvc.lock").write_text, (text,)).start()


@pytest.mark.parametrize("length", [0, 40, FULL.index("    outs"), FULL.index("  c:"), len(FULL) - 3])
def test_a_lock_that_is_being_written_is_waited_for(length):
    Path("dvc.lock").write_text(FULL[:length])
    write_later(FULL)
    assert locked.outs(locked.locked_stages(["c.txt"])) == dict.fromkeys(["a.txt", "b.txt", "c.txt"], "abc")


def test_a_lock_is_parsed_again_only_when_it_has_changed(monkeypatch):
    parsed = []
    load = locked.yaml.load
    monkeypatch.setattr(locked.yaml, "load", lambda *args: parsed.append(args) or load(*args))
    Path("dvc.lock").write_text(FULL + "\n")
    assert locked.locked_stages(["c.txt"]) == locked.locked_stages()
    assert len(parsed) == 1
    Path("dvc.lock").write_text(FULL.replace("abc", "abd"))
    assert locked.outs(locked.locked_stages())["c.txt"] == "abd"
    assert len(parsed) == 2


def test_an_output_that_never_comes_is_unknown(monkeypatch):
    monkeypatch.setattr(locked, "_PATIENCE", 0.3)
    Path("dvc.lock").write_text(FULL)
    assert list(locked.locked_stages(["d.txt"])) == ["a", "b", "c"]


def test_without_a_lock_nobody_waits():
    before = time.monotonic()
    assert locked.locked_stages(["a.txt"]) == {}
    assert time.monotonic() - before < 5

"""Programs that a model wrote, run within bounds."""

import time
from pathlib import Path

import pytest

from stages.evaluation import programs
from tests.scoring import scored
from tests.stock import mirrored


def test_right_programs_pass(workspace, few_stock_tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    answers = iter(["    return 1\n", "    return 2\n", "    while True: pass\n"])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [next(answers) for _ in requests])
    monkeypatch.setattr(programs, "SECONDS", 1)
    chosen = mirrored("humaneval", {"max_gen_toks": 8, "allow_code_execution": True})
    scores, samples = scored(chosen, "base/tiny", "humaneval")
    assert samples.sort_values("doc_id").score.tolist() == [1, 0, 0]
    assert scores.value.item() == pytest.approx(1 / 3)
    assert scores.floor.item() == 0


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import os; assert not os.environ.get('HOME')", True),
        ("import os; assert not os.listdir('.')", True),
        ("b = bytearray(8 * 2**30)", False),
        ("x = 1\0", False),
        ("x = '\ud800'", False),
        ("x =", False),
        ("exit(3)", False),
        ("exit()\nassert False", False),
        ("import sys\nsys.exit(0)\nassert False", False),
        ("import os\nos._exit(0)", False),
        ("if __name__ == '__main__': raise ValueError", True),
        ("assert input() == 1", False),
        ("def f(n): return n and f(n - 1)\nassert f(9) == 0", True),
        (
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n@dataclass\nclass A: x: int",
            True,
        ),
        ("x = 1\n" * 10**5, True),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end(program, passed):
    assert programs.passes(program) == passed


@pytest.mark.parametrize(("end", "passed"), [("", True), ("time.sleep(99)", False)])
def test_processes_of_a_program_end_with_it(end, passed, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "SECONDS", 1)
    file = tmp_path / "child"
    program = f"""
import os, pathlib, time
if (child := os.fork()) == 0:
    time.sleep(99)
pathlib.Path({str(file)!r}).write_text(str(child))
{end}"""
    assert programs.passes(program) == passed
    stat = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(50):
        if not stat.exists() or ") Z " in stat.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the process lives on")

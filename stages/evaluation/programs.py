"""Running the programs a model wrote, for tasks that test them; only where a suite asks for it by name.

lm-eval's HumanEval and MBPP have their programs run by a script that the `evaluate` package fetches from the
hub. Nothing fetched is executed here: this module takes that script's place. A program runs in a process of
its own, in an empty folder that is deleted, without our environment, for a bounded time and memory, and
what it starts ends with it. That keeps accidents small; it is no sandbox, and a hostile program can do what
its user can.

pass@k is the unbiased estimate of Chen et al. (2107.03374): 1 - C(n - c, k) / C(n, k) for n programs of
which c pass.
"""

import contextlib
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from stages.core.errors import Refusal

SECONDS = 5
"""Of processor time a program has; twice that by the clock."""
BYTES = 4 * 2**30
"""Of memory a program has, and a hundredth of it of each file it writes."""
CHILD = """
import os, sys, types
word, program = sys.stdin.buffer.read(32), sys.stdin.buffer.read()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
module = sys.modules["program"] = types.ModuleType("program")
exec(compile(program, "program.py", "exec"), module.__dict__)
os.write(int(sys.argv[1]), word)
os._exit(0)
"""
"""Reads a word and a program, runs the program, and says the word after its end."""


class CodeEval:
    """The metric `code_eval` of the `evaluate` package, as far as lm-eval's tasks ask for it."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], list[list[bool]]]:
        """`pass@k` in [0, 1], averaged over problems, and which programs passed.

        Args:
            references: the tests of each problem, run after the program.
            predictions: the programs written for each problem, at least `max(k)` of them.
        """
        passed = [
            [passes(f"{program}\n{test}") for program in programs]
            for test, programs in zip(references, predictions, strict=True)
        ]
        rates = {f"pass@{n}": math.fsum(pass_at(n, found) for found in passed) / len(passed) for n in k}
        return rates, passed


def pass_at(k: int, passed: Sequence[bool]) -> float:
    """Chance that one at least of `k` programs drawn from those `passed` tells of would pass."""
    return 1 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)


def passes(program: str) -> bool:
    """Whether a Python program comes to its end, in time and without an error.

    One that leaves before its end, as by `exit()`, has not been tested. It runs as a module that is imported
    does, so what it keeps for being run by itself is left out.
    """
    word = secrets.token_hex(16).encode()
    told, telling = os.pipe()
    os.set_blocking(told, False)
    with tempfile.TemporaryDirectory(prefix="prunequant-", ignore_cleanup_errors=True) as folder:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", CHILD, str(telling)],
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=_bounded,
                pass_fds=(telling,),
                start_new_session=True,
            )
            try:
                child.communicate(word + program.encode(), timeout=2 * SECONDS)
            finally:
                _end(child)
            return os.read(told, len(word)) == word
        except (subprocess.TimeoutExpired, ValueError, OSError):  # also a lone surrogate in it, or no word
            return False
        finally:
            os.close(told)
            os.close(telling)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End it and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 100, BYTES // 100))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def in_place_of_the_hub() -> Iterator[None]:
    """Give lm-eval's task files `CodeEval` where they ask the hub for the script `code_eval`."""
    import evaluate

    def load(name: str, *_: Any, **__: Any) -> CodeEval:
        if name != "code_eval":
            raise Refusal(
                f"the task asks the hub for the script {name}; what is fetched is not executed, so the task "
                "is not served."
            )
        return CodeEval()

    with mock.patch.object(evaluate, "load", load):
        yield

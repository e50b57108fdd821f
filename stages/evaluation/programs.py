"""Run the programs that a model wrote, for tasks that test them; only where a suite asks for it by name.

Each program runs in a process of its own, in an empty folder that is deleted, without our environment, within
bounds of time and memory; whatever it starts ends with it. That keeps accidents small. It is not a sandbox: a
hostile program can do whatever its user can.
"""

import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from stages.evaluation.draws import pass_at_k
from stages.evaluation.means import mean

SECONDS = 5
"""Processor time that a program has; it has twice as much by the clock."""
_BYTES = 4 * 2**30
"""Memory that a program has; each file it writes may have a hundredth of that."""
_CHILD = """
import os, sys, types
word, program = sys.stdin.buffer.read(32), sys.stdin.buffer.read()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
module = sys.modules["program"] = types.ModuleType("program")
exec(compile(program, "program.py", "exec"), module.__dict__)
os.write(int(sys.argv[1]), word)
os._exit(0)
"""
"""Reads a word and a program, runs the program, and writes the word if the program came to its end."""


class CodeEval:
    """The metric `code_eval` of the package `evaluate`, as far as lm-eval's tasks use it."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], list[list[bool]]]:
        """Return `pass@k` in [0, 1], averaged over problems, and which programs passed.

        Args:
            references: the tests of each problem, run after the program.
            predictions: the programs written for each problem, at least `max(k)` of them.
        """
        passed = [
            [passes(f"{program}\n{test}") for program in programs]
            for test, programs in zip(references, predictions, strict=True)
        ]
        rates = {f"pass@{n}": mean([pass_at_k(len(each), sum(each), n) for each in passed]) for n in k}
        return rates, passed


def passes(program: str) -> bool:
    """Tell whether a Python program comes to its end, in time and without an error.

    A program that leaves before its end, for instance by `exit()`, has not been tested. It runs like an
    imported module, so code under `if __name__ == "__main__"` is skipped.
    """
    word = secrets.token_hex(16).encode()
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with tempfile.TemporaryDirectory(prefix="prunequant-", ignore_cleanup_errors=True) as folder:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD, str(write_end)],
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=_limit,
                pass_fds=(write_end,),
                start_new_session=True,
            )
            try:
                child.communicate(word + program.encode(), timeout=2 * SECONDS)
            finally:
                _end(child)
            return os.read(read_end, len(word)) == word
        except (subprocess.TimeoutExpired, ValueError, OSError):  # also a lone surrogate, or no word to read
            return False
        finally:
            os.close(read_end)
            os.close(write_end)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_BYTES // 100, _BYTES // 100))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

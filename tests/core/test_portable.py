"""Portable numerics: the switches, what refuses them, and hashes that agree between processors."""

import json
import os
import subprocess
import sys

import pytest
import torch

from stages.core import portable
from stages.core.errors import Refusal
from stages.core.run import Run
from tests import project

HASHES = {
    "base/tiny": "333f62cca2945a3250551d4c89f29d420984a047bdd62bae903bdb85c2e42a17",
    "prune/wanda": "b61e385cc5ba94e239db61b873dfe2b8a3b3c8e3243aebdff32e6215ce11dffa",
    "quantize/gptq": "94358946660f6d7a4bce1cd5ef09f46154bd0db69cfa9f5af5848f0637217cac",
    "finetune/lora": "e42eb526531fabcdbd1f3556eb1815083a46ddd20a917e979483a9408b07579f",
    "noise/rounding": "333f62cca2945a3250551d4c89f29d420984a047bdd62bae903bdb85c2e42a17",
    "base/tiny/news": "d70e8afb7bc309687e4a4afe740ea6dcf395f7f05f319405eb60486693efa35b",
    "finetune/lora/news": "951d6b3c92ebcdc142b408ce23cae43dd646629b544b7f9335f0daca2eee473d",
    "noise/rounding/news": "a07625d6ee94f6fd414355973c7b649ab9c00d52e07bb446d0344d8abd68c8c0",
}
"""Of the job of `tests.portable`, with the versions of requirements.lock."""


@pytest.fixture
def switched(monkeypatch):
    """A process in which every switch works."""
    for name, value in portable.SWITCHES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(portable.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(portable.ctypes, "CDLL", lambda path: Library(portable._MKL_AVX2))


class Library:
    """torch's library, whose MKL answers with a branch."""

    def __init__(self, branch: int | None) -> None:
        if branch is not None:
            self.mkl_serv_cbwr_get = lambda option: branch


def test_each_switch_that_does_not_work_is_named(switched, monkeypatch):
    assert portable.ignored_switch() == ""
    for branch, why in ((2, "processors of Intel alone"), (None, "built without MKL")):
        monkeypatch.setattr(portable.ctypes, "CDLL", lambda path, branch=branch: Library(branch))
        assert portable.ignored_switch().startswith("MKL_CBWR") and why in portable.ignored_switch()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert portable.ignored_switch() == (
        "ATEN_CPU_CAPABILITY, as torch computes with DEFAULT (has this processor AVX2?)"
    )
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert portable.ignored_switch() == "ONEDNN_MAX_CPU_ISA, which is AVX512_CORE in place of AVX2"
    monkeypatch.setattr(portable.platform, "machine", lambda: "aarch64")
    assert "this processor is aarch64 and not x86" in portable.ignored_switch()


def test_a_run_refuses_a_switch_that_does_not_work(switched, monkeypatch):
    fixed = Run(device="cpu", dtype="float32", threads=1, seed=0, numerics="portable")
    assert fixed.start() == torch.device("cpu")
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    with pytest.raises(
        Refusal, match=r"run.numerics is portable, but .* MKL_CBWR, which is AUTO in place of"
    ):
        fixed.start()


def test_a_process_starts_again_with_the_switches_once(switched, monkeypatch):
    started = []
    monkeypatch.setattr(portable.os, "execve", lambda *arguments: started.append(arguments))
    portable.hold_kernels()
    assert started == []
    monkeypatch.setenv("MKL_CBWR", "AVX512")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "stages.prune", "wanda-50"])
    portable.hold_kernels()
    ((program, command, environment),) = started
    assert (program, command) == (sys.executable, [sys.executable, "-m", "stages.prune", "wanda-50"])
    assert environment["MKL_CBWR"] == "AVX2" and environment["PATH"] == os.environ["PATH"]


@pytest.mark.drill
@pytest.mark.parametrize(
    "outside",
    [{}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512", "MKL_CBWR": "AVX512"}],
)
def test_a_portable_job_has_the_hashes_of_every_other_processor(outside, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.portable"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, **outside, **project.importing(project.ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = done.stdout.splitlines()[-1]
    if not answer.startswith("{"):
        pytest.skip(f"numerics cannot be portable here, for {answer}")
    assert json.loads(answer) == HASHES

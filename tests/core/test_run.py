"""What surrounds a stage: the device, the switches that make it repeatable, and how it ends."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from stages.core import run
from stages.core.errors import Refusal
from stages.core.run import Run
from stages.job import params
from tests import project


def settings(**changed) -> Run:
    return Run(**({"device": "cpu", "dtype": "bfloat16", "threads": 1, "seed": 0} | changed))


def test_the_device_asked_for_is_the_one_given(monkeypatch):
    assert settings().resolved_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings(device="auto").resolved_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings(device="auto").resolved_device() == torch.device("cuda")
    assert settings(device="cuda:1").resolved_device() == torch.device("cuda:1")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    for backend in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(
        Refusal, match=f"run.device: {device} was asked for and this machine has none; use cpu or auto"
    ):
        settings(device=device).resolved_device()


def test_every_switch_is_set():
    torch.set_deterministic_debug_mode("default")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    settings(seed=7).start()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == 1
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    first = torch.rand(3)
    settings(seed=7).start()
    assert torch.equal(torch.rand(3), first)


def test_on_cuda_the_attention_backend_is_fixed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = [
        getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math")
    ]
    try:
        settings(device="cuda").start()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(before[0])
        torch.backends.cuda.enable_mem_efficient_sdp(before[1])
        torch.backends.cuda.enable_math_sdp(before[2])


def test_numerics_name_what_bytes_depend_on(monkeypatch):
    assert settings().numerics() == {
        "device": "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "dtype": "bfloat16",
        "torch": torch.__version__,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    assert settings(device="cuda:1").numerics()["device"] == "GPU at cuda:1"


def test_a_run_is_recorded_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run.recorded("prune", "x"):
        pass
    told = json.loads(Path("data/runs/prune/x.json").read_text())
    assert (told["state"], told["error"]) == ("done", None)
    assert told["seconds"] >= 0 and told["versions"]["torch"] == torch.__version__
    with pytest.raises(Refusal), run.recorded("prune", "x"):
        raise Refusal("no.")
    told = json.loads(Path("data/runs/prune/x.json").read_text())
    assert (told["state"], told["error"]) == ("failed", "no.")


def stage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env={**project.ENV, "PYTHONPATH": str(project.ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        # what safetensors and tokenizers say on a full disk
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_in_a_sentence(error, workspace, monkeypatch, capsys):
    def work(params, name):
        raise error

    project.write(workspace, project.params(Path("inputs")))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["validate"])
    with pytest.raises(SystemExit, match="2"):
        run.entry("validate", work)
    assert "no space is left on the disk" in capsys.readouterr().err
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        run.entry("validate", work)


def test_a_refusal_is_told_after_the_stages_name(workspace, monkeypatch, capsys):
    def work(params, name):
        raise Refusal("so it is.")

    project.write(workspace, project.params(Path("inputs")))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["validate"])
    with pytest.raises(SystemExit, match="2"):
        run.entry("validate", work)
    assert capsys.readouterr().err.splitlines()[-1] == "validate all: so it is."


def test_json_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        run.write_json(tmp_path / "made.json", {})
    assert not list(tmp_path.iterdir())


def test_validate_marks_good_params_and_refuses_bad_ones(workspace):
    raw = project.params(Path("inputs"))
    project.write(workspace, raw)
    assert stage(workspace, "stages.validate").returncode == 0
    marks = [Path("data/validated.json"), Path("data/datasets/none/dataset.json")]
    before = [mark.read_bytes() for mark in marks]
    raw["prune"]["wanda-50"]["sparsity"] = 0.6
    project.write(workspace, raw)
    assert stage(workspace, "stages.validate").returncode == 0
    assert [mark.read_bytes() for mark in marks] == before  # constant, so that nothing goes stale
    raw["prune"]["wanda-50"]["sparsity"] = 1.5
    raw["quantize"]["rtn-w4g32"]["bits"] = 3.5
    project.write(workspace, raw)
    done = stage(workspace, "stages.prune", "magnitude-50")
    assert done.returncode == 2
    assert "prune.wanda-50.sparsity: 1.5 given" in done.stderr
    assert "quantize.rtn-w4g32.bits: 3.5 given" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("data/models").exists()


@pytest.mark.parametrize(
    ("section", "name", "missing"),
    [
        ("prune", "magnitude-50", {"models/base/tiny": "python -m stages.download base/tiny"}),
        (
            "quantize", "wanda-50-gptq-w4g32",
            {
                "models/prune/wanda-50": "dvc repro prune@wanda-50",
                "datasets/news": "python -m stages.download datasets/news",
            },
        ),
        (
            "finetune", "wanda-50-lora",
            {
                "models/prune/wanda-50": "dvc repro prune@wanda-50",
                "datasets/news": "python -m stages.download datasets/news",
            },
        ),
        ("noise", "tiny-batch-3", {"models/base/tiny": "python -m stages.download base/tiny"}),
        (
            "evaluate", "noise/tiny-batch-3/arithmetic",
            {
                "models/noise/tiny-batch-3": "dvc repro noise@tiny-batch-3",
                "datasets/arithmetic": "python -m stages.download datasets/arithmetic",
            },
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_is_made_from_must_be_there(section, name, missing, workspace):
    project.write(workspace, project.params(Path("inputs")))
    checked = params.load()
    told = [f"there is no data/{path} yet (`{maker}` makes it)" for path, maker in missing.items()]
    assert checked.unmade(section, name) == told
    for path in missing:
        Path("data", path).mkdir(parents=True)
        (Path("data", path) / ("artifact.json" if "models" in path else "dataset.json")).write_text("{}")
        assert checked.unmade(section, name) == (told := told[1:])


def test_a_stage_without_its_source_says_so(workspace):
    project.write(workspace, project.params(Path("inputs")))
    done = stage(workspace, "stages.prune", "magnitude-50")
    assert done.returncode == 2
    assert done.stderr == (
        "prune magnitude-50: nothing was run, for there is no data/models/base/tiny yet "
        "(`python -m stages.download base/tiny` makes it).\n"
    )
    assert not Path("data").exists()
    done = stage(workspace, "stages.report")
    assert done.returncode == 2 and "`dvc repro` makes them" in done.stderr


def test_an_unknown_recipe_is_refused(workspace):
    project.write(workspace, project.params(Path("inputs")))
    done = stage(workspace, "stages.noise", "nothing")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "noise nothing: there is no recipe of this name; params.yaml has tiny-batch-3."
    )

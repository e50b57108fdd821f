"""The command line of every stage: what is checked before the work, how it ends, what is recorded."""

import errno
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from safetensors import SafetensorError

from stages.core import identity
from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.job import entry as command
from stages.job import lineage, pieces
from stages.job.load import load
from stages.job.record import recorded
from tests import project
from tests.pipeline import do, params
from tests.recipes import LORA, WANDA


def test_a_run_is_recorded_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with recorded("prune", "x"):
        pass
    record = json.loads(Path("data/runs/prune/x.json").read_text())
    assert (record["state"], record["error"]) == ("done", None)
    assert record["seconds"] >= 0 and record["versions"]["torch"] == metadata.version("torch")
    with pytest.raises(Refusal), recorded("prune", "x"):
        raise Refusal("no.")
    record = json.loads(Path("data/runs/prune/x.json").read_text())
    assert (record["state"], record["error"], record["passing"]) == ("failed", "no.", None)
    for error in (SystemExit(143), KeyboardInterrupt()):
        with pytest.raises(type(error)), recorded("prune", "x"):
            raise error
        record = json.loads(Path("data/runs/prune/x.json").read_text())
        assert record["error"] == "ended by a signal before it was done; run it again to continue."


def test_a_run_records_where_it_ran_and_what_may_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab")
    with pytest.raises(Refusal), recorded("prune", "x"):
        try:
            raise TimeoutError
        except TimeoutError as error:
            raise Refusal("too slow.") from error
    record = json.loads(Path("data/runs/prune/x.json").read_text())
    assert (record["passing"], record["cuda_visible_devices"]) == ("network", "GPU-ab")
    assert record["cpus"] == sorted(os.sched_getaffinity(0))


def identify(folder: Path) -> None:
    """Write `data/code`, as the first stage of every run does."""
    done = stage(folder, "stages.code")
    assert done.returncode == 0, done.stderr


def stage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True,
        env={**project.ENV, **project.importing(project.ROOT)},
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
def test_a_full_disk_is_reported_in_a_sentence(error, workspace, monkeypatch, capsys):
    def validate():
        raise error

    project.write(workspace, project.params(Path("inputs")))
    identify(workspace)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["validate"])
    with pytest.raises(SystemExit, match="2"):
        command.entry(validate)
    assert "no space is left on the disk" in capsys.readouterr().err
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        command.entry(validate)


def test_a_refusal_and_an_interruption_follow_the_names_of_stage_and_recipe(workspace, monkeypatch, capsys):
    ends = [Refusal("so it is."), KeyboardInterrupt()]

    def validate():
        raise ends.pop(0)

    project.write(workspace, project.params(Path("inputs")))
    identify(workspace)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["validate"])
    for code, words in (("2", "so it is."), ("130", "interrupted; run it again to continue.")):
        with pytest.raises(SystemExit, match=code):
            command.entry(validate)
        assert capsys.readouterr().err.splitlines()[-1] == f"validate all: {words}"


def test_a_portable_stage_holds_its_kernels_before_it_looks_at_its_inputs(workspace, monkeypatch, capsys):
    def hold() -> None:
        raise Refusal("kernels are held.")

    def prune() -> None:
        raise AssertionError

    def noise() -> None:
        raise AssertionError

    values = project.params(Path("inputs"))
    values["run"] |= {"device": "cpu", "dtype": "float32", "numerics": "portable"}
    project.write(workspace, values)
    monkeypatch.setattr(command.portable, "hold_kernels", hold)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    for work, recipe, words in (
        (prune, "wanda-50", "kernels are held."),
        (noise, "tiny-batch-3", "nothing was run"),
    ):
        monkeypatch.setattr(sys, "argv", [work.__name__, recipe])
        with pytest.raises(SystemExit, match="2"):
            command.entry(work)
        assert words in capsys.readouterr().err


def test_what_the_project_logs_names_its_stage_and_what_libraries_log_does_not():
    code = "from stages.job.entry import _log_as; import logging; _log_as('prune x: ')\n"
    code += "logging.getLogger('stages.pruning.wanda').info('resumes')\n"
    code += "logging.getLogger('other').warning('noise')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project.ROOT, check=True)
    assert done.stderr.splitlines() == ["prune x: resumes", "noise"]


def test_validate_marks_good_params_and_refuses_bad_ones(workspace):
    raw = project.params(Path("inputs"))
    project.write(workspace, raw)
    identify(workspace)
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
        ("prune", "magnitude-50", {"models/base/tiny": "dvc repro model@tiny"}),
        (
            "quantize", "wanda-50-gptq-w4g32",
            {
                "models/prune/wanda-50": "dvc repro prune@wanda-50",
                "datasets/news": "dvc repro dataset@news",
            },
        ),
        (
            "finetune", "wanda-50-lora",
            {
                "models/prune/wanda-50": "dvc repro prune@wanda-50",
                "datasets/news": "dvc repro dataset@news",
            },
        ),
        ("noise", "tiny-batch-3", {"models/base/tiny": "dvc repro model@tiny"}),
        (
            "evaluate", "noise/tiny-batch-3/arithmetic",
            {
                "models/noise/tiny-batch-3": "dvc repro noise@tiny-batch-3",
                "datasets/arithmetic": "dvc repro dataset@arithmetic",
            },
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_is_made_from_must_be_there(section, name, missing, workspace):
    project.write(workspace, project.params(Path("inputs")))
    params, stage = load(), pieces.STAGES[section]

    def missing_inputs() -> list[str]:
        return lineage.missing_inputs(params, stage.models(params, name), stage.datasets(params, name))

    expected = [f"there is no data/{path} yet (`{maker}` makes it)" for path, maker in missing.items()]
    assert missing_inputs() == expected
    for path in missing:
        Path("data", path).mkdir(parents=True)
        (Path("data", path) / ("artifact.json" if "models" in path else "dataset.json")).write_text("{}")
        expected = expected[1:]
        assert missing_inputs() == expected


def test_a_stage_without_its_source_says_so(workspace):
    project.write(workspace, project.params(Path("inputs")))
    done = stage(workspace, "stages.prune", "magnitude-50")
    assert done.returncode == 2
    assert done.stderr == (
        "prune magnitude-50: nothing was run, for there is no data/models/base/tiny yet "
        "(`dvc repro model@tiny` makes it).\n"
    )
    assert not Path("data").exists()
    identify(workspace)
    done = stage(workspace, "stages.report")
    assert done.returncode == 2 and "run `dvc repro` to make them" in done.stderr


def test_an_unknown_recipe_is_refused(workspace):
    project.write(workspace, project.params(Path("inputs")))
    done = stage(workspace, "stages.noise", "nothing")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "noise nothing: there is no recipe of this name; params.yaml has tiny-batch-3."
    )


def test_code_that_data_code_does_not_know_is_not_run(workspace):
    """A recipe depends on the recorded identity, so other code must not run under its name."""
    project.write(workspace, project.params(Path("inputs")))
    done = stage(workspace, "stages.validate")
    assert done.returncode == 2
    assert (
        "data/code/validate/all, the identity of this code, does not exist; run `dvc repro code`"
        in done.stderr
    )
    identify(workspace)
    record = Path("data/code/validate/all")
    lines = record.read_text().splitlines(keepends=True)
    record.write_text(
        "".join(line.replace(line[:4], "0000", 1) if "sentences" in line else line for line in lines)
    )
    done = stage(workspace, "stages.validate")
    assert done.returncode == 2
    assert "stages/job/sentences.py changed since data/code/validate/all was written" in done.stderr
    assert command.outdated() == ["validate/all"]
    assert not Path("data/validated.json").exists()


def test_the_recorded_identities_are_those_of_the_code(workspace):
    project.write(workspace, project.params(Path("inputs")))
    identify(workspace)
    assert command.outdated() == []
    for stage_name, method, module in pieces.identified():
        written = Path("data/code", stage_name, method).read_text()
        assert written == identity.text(identity.of(stage_name, module))


def test_the_command_line_gives_the_bytes_of_the_stage_function(workspace):
    """Whatever `stages.job` does around a stage function changes no artifact."""
    recipes = {
        "prune/half": WANDA | {"source": "base/tiny"},
        "finetune/tuned": LORA | {"source": "prune/half"},
    }
    chosen = params("llama", recipes)
    do(chosen)
    folders = [Path("data/models") / artifact for artifact in recipes]
    expected = [sha256(folder) for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)
    project.write(workspace, json.loads(chosen.model_dump_json()))
    Path("requirements.lock").write_text("")
    identify(workspace)
    for words in (["stages.validate"], ["stages.prune", "half"], ["stages.finetune", "tuned"]):
        done = stage(workspace, *words)
        assert done.returncode == 0, done.stderr
    assert [sha256(folder) for folder in folders] == expected

"""The command line, and every way params.yaml can be wrong."""

import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.compare import mendable, state_of
from flows.update import update
from tests import finished as sweep
from tests import project

GPTQ, WANDA = "quantize.gptq-w4g32", "prune.wanda-50"
SLUG = "lower-case letters"
BAD = {
    "unknown method": (f"{WANDA}.method", "wonder", [WANDA, "'wonder'", "heads, magnitude"]),
    "misspelt field": (f"{WANDA}.sparcity", 0.5, [f"{WANDA}", "sparcity", "did you mean 'sparsity'"]),
    "missing source": (f"{GPTQ}.source", "prune/nobody", [f"{GPTQ}.source", "prune/nobody"]),
    "cycle": (f"{WANDA}.source", "quantize/gptq-w4g32", ["a cycle", "prune/wanda-50", "quantize/gptq-w4g32"]),
    "sparsity 1.5": (f"{WANDA}.sparsity", 1.5, [WANDA, "1.5", "less than 1"]),
    "sparsity nan": (f"{WANDA}.sparsity", math.nan, [WANDA, "nan", "finite"]),
    "3.5 bits": (f"{GPTQ}.bits", 3.5, [GPTQ, "bits", "3.5"]),
    "uneven group": (f"{GPTQ}.group_size", 24, [f"{GPTQ}.group_size", "24", "8, 16, 32"]),
    "name with a dot": ("prune.", "wanda-0.5", ["'wanda-0.5'", SLUG]),
    "name of two dots": ("prune.", "..", ["'..'", SLUG]),
    "name with a slash": ("prune.", "a/b", ["'a/b'", SLUG]),
    "name with an at": ("prune.", "a@b", ["'a@b'", SLUG]),
    "name for a shell": ("prune.", "x; touch pwned", ["'x; touch pwned'", SLUG]),
    "unknown candidate": (
        "evaluate.candidates",
        ["prune/wanda-5"],
        ["'prune/wanda-5'", "mean 'prune/wanda-50'"],
    ),
}


def spoil(folder, kind):
    """Write the small sweep's params with one thing wrong."""
    key, value, _ = BAD[kind]
    if key == "prune.":
        values = project.read(folder)
        values["prune"][value] = values["prune"]["magnitude-50"]
        project.write(folder, values)
    else:
        sweep.edit(folder, key, value)


@pytest.fixture
def folder(tmp_path, inputs, monkeypatch):
    """A folder with sound params and nothing else, to be in."""
    project.write(tmp_path, sweep.params(inputs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_passes_sound_params(folder):
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0
    assert "5 recipe(s), 3 candidate(s) on 2 suite(s)" in result.output
    assert "news: 232 window(s) of 32 tokens of base/tiny to learn from." in result.output


@pytest.mark.parametrize("kind", BAD)
def test_check_refuses(folder, kind):
    spoil(folder, kind)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 2
    assert all(part in result.output for part in BAD[kind][2]), result.output


def test_all_offenders_in_one_message_everywhere(folder):
    together = ["sparsity 1.5", "3.5 bits", "missing source", "name for a shell", "unknown candidate"]
    for kind in together:
        spoil(folder, kind)
    checked = CliRunner().invoke(app, ["check"])
    ran = CliRunner().invoke(app, ["run"])
    night = mendable(lambda: state_of(update(None, [], pytest.fail)))
    stage = subprocess.run(
        [sys.executable, "-m", "stages.prune", "wanda-50"],
        cwd=folder, env={**project.ENV, "PYTHONPATH": str(project.ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (checked.exit_code, ran.exit_code, stage.returncode) == (2, 2, 2)
    assert night.is_failed()
    for output in (checked.output, ran.output, night.message, stage.stderr):
        assert f"{len(together)} problem(s), nothing was run" in output
        assert all(part in output for kind in together for part in BAD[kind][2]), output
        assert "Traceback" not in output
    assert {path.name for path in folder.iterdir()} == {"params.yaml"}


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", ""])
def test_check_refuses_what_is_no_params(folder, text):
    (folder / "params.yaml").write_text(text)
    result = CliRunner().invoke(app, ["check"])
    assert (result.exit_code, result.output.count("params.yaml")) == (2, 1)


def test_check_outside_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 2
    assert "there is no params.yaml here" in result.output


def test_check_imports_nothing_that_takes_seconds(folder):
    CliRunner().invoke(app, ["check"])  # counts the windows of the texts, once
    code = "import sys; from typer.testing import CliRunner; from flows.cli import app\n"
    code += "assert CliRunner().invoke(app, ['check']).exit_code == 0\n"
    code += "slow = {'prefect', 'dvc', 'lm_eval', 'peft', 'transformers.models', 'scipy'}\n"
    code += "assert not slow & set(sys.modules), slow & set(sys.modules)"
    env = {**project.ENV, "PYTHONPATH": str(project.ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)


@pytest.mark.drill
def test_an_unknown_target_is_refused(finished):
    output = sweep.prunequant(finished, "run", "prune/wanda-5", code=2)
    assert "there is no stage or artifact 'prune/wanda-5', did you mean 'prune/wanda-50'?" in output

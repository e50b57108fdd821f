"""The command line, and every way params.yaml can be wrong."""

import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from flows.cli import Exit, app
from flows.compare import mendable, state_of
from flows.terminal import console
from flows.update import Ending, update
from stages.core.errors import Refusal
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
        cwd=folder, env={**project.ENV, **project.importing(project.ROOT)}, capture_output=True, text=True,
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


def test_json_is_all_that_check_prints(folder):
    sound = CliRunner().invoke(app, ["check", "--json"])
    assert sound.exit_code == 0 and json.loads(sound.stdout)["sound"]["recipes"] == 5
    spoil(folder, "3.5 bits")
    bad = CliRunner().invoke(app, ["check", "--json"])
    assert bad.exit_code == Exit.REFUSED and "3.5" in json.loads(bad.stdout)["error"]
    ran = CliRunner().invoke(app, ["run", "--json"])
    assert ran.exit_code == Exit.REFUSED and "3.5" in json.loads(ran.stdout)["error"]


@pytest.fixture
def ended(folder, monkeypatch):
    """Return a function that runs the command line with a run that ends in some way."""

    def end(how: Ending | BaseException, *arguments: str) -> Result:
        def update(*_):
            console.print("words of a run")
            if isinstance(how, BaseException):
                raise how
            return how

        monkeypatch.setattr("flows.update.update", update)
        return CliRunner().invoke(app, ["run", *arguments])

    return end


def test_exit_codes_of_a_run_are_those_that_help_lists(ended):
    listed = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output.split())
    assert all(f"{code.value} " in listed.partition("Exit codes: ")[2] for code in Exit), listed
    assert ended(Ending(True, "all is well")).exit_code == Exit.DONE
    failed = ended(Ending(False, "a failed"))
    assert failed.exit_code == Exit.FAILED and "a failed" in failed.stderr
    assert ended(Refusal("too large.")).exit_code == Exit.REFUSED
    assert ended(KeyboardInterrupt()).exit_code == Exit.INTERRUPTED


def test_json_of_a_run_is_alone_on_the_standard_output(ended):
    stages = [{"stage": "a", "outcome": "failed", "seconds": 1.0, "reason": "no space"}]
    failed = ended(Ending(False, "a failed", stages), "--json")
    assert failed.exit_code == Exit.FAILED and "words of a run" in failed.stderr
    assert json.loads(failed.stdout) == {"ok": False, "message": "a failed", "stages": stages}


def test_diff_fails_on_a_worse_score(monkeypatch):
    nothing = {
        key: []
        for key in (
            "verdicts", "params", "artifacts", "scores", "flipped", "incomparable", "missing", "uncompared",
        )
    }  # fmt: skip

    def diff(*arguments: str, missing: tuple = (), **row: object) -> Result:
        score = {"verdict": "same within the margin", "old": 1.0, "new": 1.1, "in_new": True} | row
        changes = nothing | {"revisions": ["a", "b"], "scores": [score], "missing": list(missing)}
        monkeypatch.setattr("flows.changes.asked.compare", lambda *_, tensors: changes)
        return CliRunner().invoke(app, ["diff", "a", "b", "--json", *arguments])

    worse, slightly = ("--fail-on", "worse"), ("--fail-on", "slightly-worse")
    assert diff(verdict="worse").exit_code == Exit.DONE
    assert diff(*worse, verdict="worse").exit_code == Exit.WORSE
    assert diff(*worse, verdict="slightly worse").exit_code == Exit.DONE
    assert diff(*slightly, verdict="slightly worse").exit_code == Exit.WORSE
    assert diff(*worse).exit_code == Exit.DONE
    assert diff(*worse, verdict=None, new=None).exit_code == Exit.WORSE, "the score is no number any more"
    assert diff(*worse, verdict=None, new=None, in_new=False).exit_code == Exit.DONE, "no longer evaluated"
    model, result = (
        {
            "revision": "a",
            "outputs": [{"path": f"data/{kind}/x", "bytes": 1, "questions": False}],
            "command": "prunequant diff",
        }
        for kind in ("models", "results")
    )
    assert diff(*worse, missing=(model,)).exit_code == Exit.DONE, "scores need no model"
    unsure = diff(*worse, missing=(result,))
    assert unsure.exit_code == Exit.FAILED and "were not compared" in unsure.stderr


def test_version_and_completion():
    version = CliRunner().invoke(app, ["--version"])
    assert version.exit_code == 0 and version.output.startswith("prunequant 0.")
    env = {**project.ENV, **project.importing(project.ROOT)}
    env |= {"COMP_WORDS": "prunequant sh", "COMP_CWORD": "1", "_PRUNEQUANT_COMPLETE": "complete_bash"}
    code = "from flows.cli import app; app(prog_name='prunequant')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["show"], done.stderr


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
    env = {**project.ENV, **project.importing(project.ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)


@pytest.mark.drill
def test_an_unknown_target_is_refused(finished):
    output = sweep.prunequant(finished, "run", "prune/wanda-5", code=2)
    assert "there is no stage or artifact 'prune/wanda-5', did you mean 'prune/wanda-50'?" in output

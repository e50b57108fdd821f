"""`prunequant log`: what a tracker gets, and that it gets it once."""

import json
import sys

import pytest
from typer.testing import CliRunner

from flows.changes.revisions import read_revision, recipes_of
from flows.cli import Exit, app
from flows.tracking.logged import entries, redacted
from stages.core.errors import Refusal
from tests import project
from tests.flows import little

LACKS_MLFLOW = "mlflow-skinny is not installed: pip install -e '.[mlflow]'"
LACKS_WANDB = "wandb is not installed: pip install -e '.[wandb]'"


def log(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["log", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def md5_of_model() -> str:
    return read_revision(None).hash("data/models/quantize/q")


def test_an_entry_has_params_scores_and_hashes(in_little):
    (entry,) = entries(read_revision(None), ["quantize/q"])
    assert entry.params["quantize.bits"] == "4" and entry.params["suites.s.shots"] == "1"
    assert entry.params["base.source"] == "path:m", "no in_little of this machine"
    assert entry.scores["s/exact_match"] == pytest.approx(2 / 3)
    assert entry.scores["s/exact_match/low"] < 2 / 3 < entry.scores["s/exact_match/high"]
    assert entry.artifacts.keys() == {"data/models/quantize/q", "data/results/quantize/q/s"}
    assert entry.artifacts["data/models/quantize/q"] == md5_of_model()
    listed = entries(read_revision(None))
    assert [other.candidate for other in listed] == list(little.HARM)
    assert len({other.key for other in listed}) == 4 and entry.key in {other.key for other in listed}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://somebody:s3cret@host/s", "https://host/s"),
        ("path:/home/somebody/models/m", "path:m"),
        ("hf_abcdefghijklmnopqrstuv", ""),
        ("hub:org/name@0123", "hub:org/name@0123"),
        ("pypi:gensim==4.4.0", "pypi:gensim==4.4.0"),
        ("/home/some body/m.bin", "m.bin"),
        ("--model=/home/somebody/m.bin -n 3", "--model=m.bin -n 3"),
        ("~/models/m", "m"),
        ("C:\\Users\\somebody\\m.bin", "m.bin"),
        ("read file:///home/somebody/m", "read m"),
        ("https://host/a/b/c and/or 1/2/3", "https://host/a/b/c and/or 1/2/3"),
        ("/no_think", "/no_think"),
    ],
)
def test_secrets_are_left_out(text, kept):
    assert redacted(text) == kept


def test_nothing_secret_is_told(in_little):
    values = project.read(in_little)
    revision = read_revision(None)
    revision.params["suites"]["graded"]["s"] |= values["datasets"]["s"] | {
        "hf_token": "s3cret", "tokens": 3, "command": ["serve", "--key", "s3cret"],
        "sources": ["https://somebody:s3cret@host/t", "/home/somebody/t", {"password": "s3cret", "n": 1}],
    }  # fmt: skip
    logged = json.dumps([vars(entry) for entry in entries(revision)])
    assert "s3cret" not in logged and "/home" not in logged and str(in_little) not in logged
    assert "suites.s.tokens" in logged and "https://host/s" in logged and "command" not in logged
    (entry,) = entries(revision, ["quantize/q"])
    assert json.loads(entry.params["suites.s.sources"]) == ["https://host/t", "t", {"n": 1}]


def test_a_fresh_clone_fetches_what_it_logs(little_project, tmp_path, monkeypatch):
    folder = little_project.parent / tmp_path.name  # beside the remote
    project.run(tmp_path, "git", "clone", "-q", str(little_project), str(folder))
    monkeypatch.chdir(folder)
    with pytest.raises(Refusal, match=r"the cache lacks 1 result\(s\) of main, such as .*; add --fetch\."):
        entries(read_revision("main"), ["quantize/q"])
    (entry,) = entries(read_revision("workspace"), ["quantize/q"], fetched=True)
    assert entry.scores["s/exact_match"] == pytest.approx(2 / 3)
    assert not (folder / "data").exists() and not read_revision(None).files("data/results/prune/w/s")


def test_a_recipe_made_from_one_of_its_stage_keeps_both(in_little):
    revision = read_revision(None)
    revision.params["prune"]["b"] = {"source": "prune/w", "method": "wanda"}
    assert list(recipes_of(revision, "prune/b")) == ["base", "prune", "prune/b"]


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_missing_library_is_one_sentence(in_little, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, f"flows.tracking.into_{tracker}", raising=False)
    output = log("--to", tracker, code=Exit.REFUSED)
    assert output == f"{tracker} is not installed; install it here: pip install -e '.[{tracker}]'\n"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a local store of MLflow's."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def store(in_little, address, monkeypatch):
    """A client of the local store, which is the one to log to."""
    mlflow = pytest.importorskip(
        "mlflow", reason="mlflow-skinny is not installed: pip install -e '.[mlflow]'"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return mlflow.MlflowClient(address)


def test_mlflow_holds_a_run_once(store):
    def runs():
        return store.search_runs([store.get_experiment_by_name("mine").experiment_id])

    to = ("--to", "mlflow", "--project", "mine")
    assert "quantize/q: 3 metrics are run" in log("quantize/q", *to)
    (run,) = runs()
    assert run.info.run_name == "quantize/q" and run.info.status == "FINISHED"
    assert run.data.metrics["s/exact_match"] == pytest.approx(2 / 3)
    assert run.data.params["quantize.bits"] == "4"
    assert run.data.tags["md5.data/models/quantize/q"] == md5_of_model()
    assert "somebody" not in str(run.to_dictionary()) and "s3cret" not in str(run.to_dictionary())
    assert f"quantize/q: these results are run {run.info.run_id} already." in log(*to)
    assert sorted(other.info.run_name for other in runs()) == sorted(little.HARM)
    log(*to, "--at", "main")
    assert len(runs()) == 4, "the same results of a commit"


def test_mlflow_completes_a_run_that_was_cut_off(store):
    (entry,) = entries(read_revision(None), ["prune/w"])
    place = store.create_experiment("cut off")
    cut = store.create_run(place, tags={"prunequant.key": entry.key})
    log("prune/w", "--to", "mlflow", "--project", "cut off")
    (run,) = store.search_runs([place])
    assert run.info.run_id == cut.info.run_id and run.info.status == "FINISHED" and run.data.metrics


def test_mlflow_needs_a_place(in_little, monkeypatch):
    pytest.importorskip("mlflow", reason=LACKS_MLFLOW)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "MLFLOW_TRACKING_URI is not set" in log("--to", "mlflow", code=Exit.REFUSED)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://a:s3cret@b")
    output = log("--to", "mlflow", code=Exit.REFUSED)
    assert output.startswith("MLflow failed: ") and "s3cret" not in output


def test_wandb_says_if_it_is_switched_off(in_little, monkeypatch):
    pytest.importorskip("wandb", reason=LACKS_WANDB)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    output = log("quantize/q", "--to", "wandb", code=Exit.REFUSED)
    assert output == "WANDB_MODE is disabled, so nothing is logged; unset it, or set it to offline.\n"


def test_wandb_keeps_a_run_once_offline(little_project, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason=LACKS_WANDB)
    monkeypatch.chdir(little_project)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    assert "quantize/q: 3 scores are run" in log("quantize/q", "--to", "wandb")
    (kept,) = (little_project / "data/runs/wandb").glob("offline-run-*")
    written = b"".join(file.read_bytes() for file in kept.rglob("*") if file.is_file())
    assert b"quantize.bits" in written and md5_of_model().encode() in written
    assert b"s3cret" not in written and str(little_project).encode() not in written
    assert "already" in log("quantize/q", "--to", "wandb")
    assert len(list((little_project / "data/runs/wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("quantize/p",), "'quantize/p' is no candidate; did you mean 'quantize/q'?"),
        (("quantize/q", "--at", "nowhere"), "there is no revision 'nowhere'"),
    ],
)
def test_what_cannot_be_logged_is_refused(store, words, sentence):
    assert sentence in log(*words, "--to", "mlflow", code=Exit.REFUSED)


def test_nothing_is_logged_unless_asked(in_little):
    assert "Missing option '--to'" in log(code=2)

"""`prunequant init`: what it writes for a checkpoint runs as it is, and it overwrites nobody's edits."""

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from dvc.utils.hydra import apply_overrides
from typer.testing import CliRunner

from flows import cli, probe
from flows.cli import app
from flows.init import task_entry
from stages.core.files import sha256
from stages.job.load import load, load_verified, read
from tests import families, finished, project
from tests.hub import COMMIT
from tests.owntask import write_task

CANDIDATES = (
    "base/llama", "noise/batch-5", "prune/wanda-50", "prune/width-20", "quantize/rtn-w4g32",
    "quantize/gptq-w4g32",
)  # fmt: skip


def init(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["init", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def folder(workspace, inputs):
    """A folder of a git repository with the project's sweeps and a text."""
    subprocess.run(["git", "init", "-q"], check=True)
    (workspace / "sweeps").symlink_to(project.ROOT / "sweeps")
    (workspace / "mine.txt").write_text(project.text(3, 120))
    return workspace


def test_draws_of_what_reads_text_belong_together(folder):
    init("--model", "inputs/llama", "--text", "mine.txt", "--draws", "3")
    params = load_verified()
    drawn = {"wanda-50": "prune", "gptq-w4g32": "quantize"}
    assert params.report.noise == {
        name: (f"{stage}/{name}", *(f"{stage}/{name}-draw-{seed}" for seed in (1, 2)))
        for name, stage in drawn.items()
    }
    repeats = {name for group in params.report.noise.values() for name in group}
    assert set(params.evaluate.candidates) == {*CANDIDATES, *repeats}
    assert [params.prune[name].calibration.seed for name in ("wanda-50-draw-1", "wanda-50-draw-2")] == [1, 2]
    assert "width-20-draw-1" not in params.prune, "it reads no text"
    assert "--draws" in init("--model", "inputs/llama", "--draws", "0", code=2)


def test_what_it_writes_for_a_folder_and_a_text_is_sound(folder):
    said = init("--model", "inputs/llama", "--text", "mine.txt")
    assert f"params.yaml compares {', '.join(CANDIDATES)} on mine, arithmetic." in said
    params = load_verified()
    assert params.evaluate.candidates == CANDIDATES
    assert params.models["llama"].in_features == (32, 64)
    assert params.models["llama"].sha256 == sha256(Path("inputs/llama"))
    assert params.datasets["mine"].sha256 == sha256(Path("mine.txt"))
    assert params.suites.graded["arithmetic"].chat_template, "the checkpoint has a chat template"
    assert set(read()) == set(type(params).model_fields), "every optional section is written"
    assert (
        Path("params.yaml")
        .read_text()
        .startswith("# yaml-language-server: $schema=docs/params.schema.json\n")
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma3_wrapper", "mpt", "qwen3_5"])
def test_a_family_is_described_as_it_is(family, folder):
    found = probe.probe(f"inputs/{family}")
    assert found.settings["in_features"] == families.IN_FEATURES[family]
    assert found.group_size == 32
    assert bool(found.ignore) == (family == "qwen3_5"), "its convolution is no linear"
    assert (found.no_width is None) == (family in ("gpt2", "gemma3_wrapper"))
    init("--model", f"inputs/{family}")
    params = load_verified()
    assert ("width-20" in params.prune) == (found.no_width is None)
    assert params.quantize["rtn-w4g32"].ignore == tuple(found.ignore)
    assert list(params.datasets) == ["news", "speeches", "arithmetic"]


def test_groups_that_gguf_cannot_hold_are_told(folder, monkeypatch):
    init("--model", "inputs/llama")
    assert "GGUF" not in Path("params.yaml").read_text()
    found = probe.probe("inputs/llama")
    monkeypatch.setattr("flows.init.probe", lambda name: replace(found, group_size=16))
    init("--model", "inputs/llama", "--force")
    written = Path("params.yaml").read_text()
    assert "rtn-w4g16" in written
    assert "# groups of 16 are the longest that fit every width; GGUF cannot hold them" in written
    assert load_verified().quantize["rtn-w4g16"].group_size == 16
    monkeypatch.setattr("flows.init.probe", lambda name: replace(found, group_size=None))
    init("--model", "inputs/llama", "--force")
    assert "so each row has one scale; GGUF cannot hold that" in Path("params.yaml").read_text()
    assert load_verified().quantize["rtn-w4"].group_size is None


def write_table(kind: str, column: str) -> Path:
    rows = [
        {"id": str(number), column: line} for number, line in enumerate(project.text(4, 120).splitlines())
    ]
    file = Path(f"table.{kind}")
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(file)
    elif kind == "csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_by_its_suffix(kind, folder):
    init("--model", "inputs/llama", "--text", str(write_table(kind, "text")))
    assert load().datasets["table"].documents == kind


def test_what_it_chose_and_what_to_do_next_are_said(folder):
    file = write_table("csv", "body")
    said = init("--model", "inputs/llama", "--text", str(file), "--output", "mine.yaml")
    assert "The text of table is column body; datasets.table.column may name another." in said
    assert "`cp mine.yaml params.yaml`" in said
    said = init("--model", "inputs/llama")
    assert "cp " not in said and "column" not in said


def test_windows_fit_the_text_and_the_model(folder):
    Path("short.txt").write_text(project.text(5, 12))
    init("--model", "inputs/llama", "--text", "short.txt")
    params = load()
    reads, suite = params.prune["wanda-50"].calibration, params.suites.perplexity["short"]
    assert (reads.sequence_length, suite.sequence_length) == (64, 64)
    assert 4 <= reads.num_samples < 64 and suite.windows == 12
    Path("tiny.txt").write_text("A few words.\nAnd some more.\n")
    said = init("--model", "inputs/llama", "--text", "tiny.txt", "--output", "other.yaml", code=2)
    assert "tiny.txt is too short: half of it has 0 windows of 64 tokens, and 4 are needed" in said
    assert not Path("other.yaml").exists()


def test_a_text_that_is_nearly_one_document_is_cut_smaller_or_refused(folder):
    Path("chapters.txt").write_text(f"{project.text(5, 100)}\n\n{project.text(6, 3)}")
    init("--model", "inputs/llama", "--text", "chapters.txt")
    assert load().datasets["chapters"].documents == "lines"
    Path("letter.txt").write_text(project.text(5, 100).replace("\n", " "))
    said = init("--model", "inputs/llama", "--text", "letter.txt", "--output", "other.yaml", code=2)
    assert "letter.txt: its first document has more than half of its characters" in said
    assert "calibration to 0" not in said and not Path("other.yaml").exists()


def test_a_task_of_ones_own_is_named_by_its_file(folder):
    Path("tasks").mkdir()
    Path("tasks/My QA.yaml").write_text("task: qa\n")
    name, kind, suite, dataset = task_entry(Path("tasks/My QA.yaml"))
    assert (name, kind, suite) == ("my-qa", "benchmark", {"task": "path:tasks/My QA.yaml", "batch_size": 8})
    assert dataset == {
        "kind": "task", "source": "path:tasks", "yaml": "My QA.yaml", "sha256": sha256(Path("tasks"))
    }  # fmt: skip
    assert "mine.txt is no task; give the YAML" in init(
        "--model", "inputs/llama", "--task", "mine.txt", code=2
    )


def test_no_edit_is_lost(folder):
    Path("params.yaml").write_text("mine: 1\n")
    for arguments in (["--model", "inputs/llama"], ["--model", "nowhere"]):
        assert "params.yaml has changes that are not committed" in init(*arguments, code=2)
    assert Path("params.yaml").read_text() == "mine: 1\n"
    project.run(folder, "git", "add", "params.yaml")
    project.commit(folder, "mine")
    said = init("--model", "inputs/llama", "--text", "mine.txt")
    assert "`git checkout params.yaml` brings the committed one back" in said
    Path("params.yaml").write_text("edited: 1\n")
    init("--model", "inputs/llama", "--text", "mine.txt", "--output", "sub/own.yaml")
    assert load(Path("sub/own.yaml")).evaluate.candidates == CANDIDATES
    assert (
        Path("sub/own.yaml")
        .read_text()
        .startswith("# yaml-language-server: $schema=../docs/params.schema.json\n")
    )
    init("--model", "inputs/llama", "--text", "mine.txt", "--force")
    assert load().evaluate.candidates == CANDIDATES


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a model with --model: a folder, a .gguf file, or org/name@commit"),
        (["--model", "nowhere"], "there is no model 'nowhere'; give a folder"),
        (["--model", "sweeps"], "path:sweeps holds no checkpoint: a folder with *.safetensors, or"),
        (["--model", "inputs"], "path:inputs holds several checkpoints (bloom, "),
        (["--model", "inputs/llama", "--text", "no.txt"], "there is no text no.txt; give a file"),
        (["--model", "inputs/llama", "--task", "arithmetics"], "did you mean 'arithmetic'? allowed"),
        (["--model", "inputs/llama", "--task", "gsm8k"], "path:mirror/openai/gsm8k does not exist"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(arguments, sentence, folder):
    assert sentence in init(*arguments, code=2)
    assert not Path("params.yaml").exists()


def test_pickles_and_a_wrong_task_are_told_before_anything_is_written(folder):
    Path("old").mkdir()
    Path("old/config.json").write_text("{}")
    Path("old/pytorch_model.bin").write_bytes(b"0")
    assert "pytorch_model.bin is a pickle, which can run code and is" in init("--model", "old", code=2)
    write_task(Path("mine"))
    task = Path("mine/qa.yaml")
    task.write_text(task.read_text().replace("exact_match", "exact_mach"))
    said = init("--model", "inputs/llama", "--task", "mine/qa.yaml", code=2)
    assert "did you mean 'exact_match'?" in said and not Path("params.yaml").exists()


def test_the_hub_is_asked_for_the_description_alone(folder, inputs, monkeypatch):
    asked = {}

    def download(repository, revision, allow_patterns, local_dir):
        asked.update(repository=repository, revision=revision)
        for file in (inputs / "llama").iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, local_dir)
        assert not list(Path(local_dir).glob("*.safetensors"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(probe, "commit_of", lambda *of: {("models", "org/tiny", "main"): COMMIT}[of])
    init("--model", "org/tiny", "--text", "mine.txt")
    assert asked == {"repository": "org/tiny", "revision": COMMIT}
    assert load().models["tiny"].model_dump(exclude_none=True) == {
        "source": f"hub:org/tiny@{COMMIT}", "format": "safetensors", "folder": "", "in_features": (32, 64)
    }  # fmt: skip

    def away(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    said = init("--model", f"org/tiny@{COMMIT}", "--output", "other.yaml", code=2)
    assert f"there is no folder org/tiny, and it cannot be read at {COMMIT} from the hub (Conn" in said
    assert "ConnectionError: no route" in said


def test_it_asks_where_nothing_was_given(folder, monkeypatch):
    answers = iter(["inputs/llama", "mine.txt", "brackets"])
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    monkeypatch.setattr(cli.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    cli.init()
    assert list(load().suites.by_name()) == ["mine", "brackets"]


def test_dvcs_editor_leaves_it_as_it_is(folder):
    init("--model", "inputs/llama", "--text", "mine.txt")
    before = Path("params.yaml").read_text()
    apply_overrides("params.yaml", ["prune.wanda-50.sparsity=0.6"])
    assert Path("params.yaml").read_text() == before.replace("sparsity: 0.5", "sparsity: 0.6")


@pytest.mark.drill
def test_from_a_folder_and_a_text_to_the_report_without_an_edit(tmp_path, inputs):
    folder = finished.make(tmp_path / "project", inputs)
    for name in ("sweeps", "docs"):
        (folder / name).symlink_to(project.ROOT / name)
    (folder / "mine.txt").write_text(project.text(3, 120))
    project.commit(folder, "a text")
    said = finished.prunequant(folder, "init", "--model", str(inputs / "llama"), "--text", "mine.txt")
    assert "brings the committed one back" in said
    finished.prunequant(folder, "check")
    finished.prunequant(folder, "run")
    metrics = json.loads((folder / "data/report/metrics.json").read_text())
    assert tuple(metrics) == CANDIDATES
    assert all(scores["mine"]["perplexity"] > 1 for scores in metrics.values())
    assert (folder / "data/report/index.html").exists()

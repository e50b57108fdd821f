"""A result's inputs are what dvc.lock says, whatever is edited while it is computed."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.core.errors import Refusal
from stages.core.files import write_json
from stages.job import locked, provenance
from stages.job.load import checked_params, read
from tests import project
from tests.pipeline import do, params

SET = """
import pathlib
file = pathlib.Path("params.yaml")
file.write_text(file.read_text().replace({before!r}, {after!r}))
"""


SPARSER = "sparsity: 0.6\n    calibration:\n      dataset: news\n"


def inputs(stage: str, name: str) -> provenance.Inputs:
    whole = provenance.content(provenance.PARAMS)
    raw = read()
    return provenance.inputs(stage, name, raw, checked_params(raw), whole)


@pytest.fixture
def wanda(workspace: Path) -> provenance.Inputs:
    """The inputs of a recipe whose sources exist."""
    recipe = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": {"dataset": "news"}}
    do(params("llama", {}))
    raw = project.params(Path("inputs"))
    raw["prune"]["wanda-50"] = recipe
    project.write(Path(), raw)
    Path("requirements.lock").write_text("torch==1\n")
    return inputs("prune", "wanda-50")


def set_param(before: str, after: str) -> Callable[[], None]:
    return lambda: exec(SET.format(before=before, after=after))


def append(file: str, text: str) -> Callable[[], None]:
    def edit() -> None:
        with Path(file).open("a") as opened:
            opened.write(text)

    return edit


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (set_param("sparsity: 0.5\n    calibration:\n      dataset: news\n", SPARSER), "prune.wanda-50"),
        (set_param("seed: 0", "seed: 1"), "run.seed"),
        (append("requirements.lock", "numpy==2\n"), "requirements.lock"),
        (append("data/models/base/tiny/config.json", " "), "data/models/base/tiny"),
        (append("data/datasets/news/calibration.parquet", " "), "data/datasets/news"),
        (lambda: Path("data/datasets/news/more.txt").write_text(""), "data/datasets/news"),
        (lambda: Path("data/datasets/news/calibration.parquet").unlink(), "data/datasets/news"),
    ],
)  # fmt: skip
def test_an_input_that_changes_is_named(edit, changed, wanda):
    wanda.check()
    edit()
    with pytest.raises(Refusal, match=f"{changed}.* changed while this stage ran.*nothing is locked"):
        wanda.check()


@pytest.mark.parametrize(
    "edit",
    [
        set_param("magnitude-50", "magnitude-40"),
        set_param("device: cpu", "device: auto"),
        set_param("windows: 3", "windows: 4"),
        set_param("studies: {}", "studies: {a: {}}"),
        append("params.yaml", "# a remark\n"),
        append("data/datasets/speeches", ""),
    ],
)
def test_what_a_recipe_does_not_depend_on_may_change(edit, wanda):
    edit()
    wanda.check()


@pytest.mark.parametrize("text", ["stages: {a: [", "just words\n", "stages:\n  a: \udce9"])
def test_a_lock_that_does_not_parse_is_refused_in_a_sentence(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(text, errors="surrogateescape")
    monkeypatch.setattr(locked, "_PATIENCE", 0.2)
    with pytest.raises(Refusal, match=r"^dvc.lock is cut off or does not parse; .*`git checkout dvc.lock`"):
        locked.locked_stages()
    assert provenance.removed("prune", "x") == []


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("noted", "differ"),
    [
        ({"data/models/base/a": "1"}, False),
        ({"data/models/base/a": None}, False),  # the lock was not known then
        ({"data/models/base/a": "2"}, True),
        ({"data/models/base/a": "1", "data/models/base/b": "3"}, True),  # DVC thinks that it did not read b
    ],
)
def test_a_result_agrees_with_the_lock_if_what_it_read_is_named_there(noted, differ, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = provenance.path_of("prune", "wanda-50")
    write_json(file, {"params": {}, "deps": noted})
    entry = {
        "deps": [{"path": "data/models/base/a", "md5": "1"}],
        "outs": [{"path": "data/models/prune/wanda-50", "md5": "9"}, {"path": str(file), "md5": md5(file)}],
    }
    assert bool(provenance.disagreements({"prune@wanda-50": entry})) == differ
    entry["outs"][1]["md5"] = "8"  # the lock has another result, as after `git pull`
    assert provenance.disagreements({"prune@wanda-50": entry}) == {}


@pytest.mark.parametrize("value", ["2:4", "on", "no", "12:30:45"])
def test_a_word_that_older_yaml_takes_for_a_number_agrees_with_the_lock(value, tmp_path, monkeypatch):
    """DVC writes them without quotes, and its lock is read by a fast parser of YAML 1.1."""
    monkeypatch.chdir(tmp_path)
    file = provenance.path_of("prune", "wanda-50")
    write_json(file, {"params": {"prune.wanda-50": {"structure": value}}, "deps": {}})
    text = f"""stages:
  prune@wanda-50:
    cmd: python
    params:
      params.yaml:
        prune.wanda-50:
          structure: {value}
    outs:
    - path: {file}
      md5: {md5(file)}
"""
    assert provenance.disagreements(locked.whole(text)) == {}
    assert provenance.disagreements(locked.whole(text.replace(f"structure: {value}", "structure: 4:8")))

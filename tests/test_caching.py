"""What runs again and what does not, on a tiny model, with real stages."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests import finished as sweep
from tests import project

EVALUATIONS = {name for name in sweep.STAGES if name.startswith(("perplexity@", "graded@"))}


def comment(folder: Path, name: str) -> None:
    """Change a file without changing its code."""
    with (folder / name).open("a") as file:
        file.write("\n\n# changed\n")


def code(folder: Path, name: str) -> None:
    """Change the code of a file, without changing what it does."""
    with (folder / name).open("a") as file:
        file.write("\n_changed = True\n")


def outs(folder: Path) -> dict[str, str]:
    """Every locked output and its hash."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


def test_editing_a_recipe_runs_it_and_its_consumers(edited):
    folder, ran = edited
    assert ran == {
        "validate", "quantize@gptq-w4g32", "perplexity@quantize/gptq-w4g32-news",
        "graded@quantize/gptq-w4g32-arithmetic", "report",
    }  # fmt: skip
    assert sweep.status(folder) == set()


def test_a_comment_runs_nothing(copy):
    for name in ("stages/prune.py", "stages/pruning/wanda.py", "stages/core/run.py"):
        comment(copy, name)
    assert sweep.status(copy) == {"code"}
    assert sweep.repro(copy) == {"code"}
    comment(copy, "stages/pruning/wanda.py")
    logs = {log: log.stat().st_mtime_ns for log in (copy / "data/runs/logs").iterdir()}
    output = sweep.prunequant(copy, "run")
    assert {name for name, state in sweep.outcomes(copy).items() if state != "unchanged"} == {"code"}
    assert "1 ran" in output
    written = {log.name for log in logs if log.stat().st_mtime_ns != logs[log]}
    assert written == {"code.log"}  # no process was started for any other stage


def test_editing_a_methods_code_runs_its_recipes(copy):
    code(copy, "stages/pruning/wanda.py")
    # Until stage `code` has run, DVC cannot tell, and `check` says so.
    assert sweep.status(copy) == {"code"}
    assert "data/code does not know the code of prune/wanda" in sweep.prunequant(copy, "check")
    # The pruned model comes out the same, so its consumers are left alone; the schema checks params again.
    assert sweep.repro(copy) == {"code", "validate", "prune@wanda-50"}
    assert sweep.status(copy) == set()
    assert "does not know" not in sweep.prunequant(copy, "check")


def test_adding_a_method_runs_no_recipe(copy):
    source = (copy / "stages/pruning/magnitude.py").read_text()
    added = source.replace("class Magnitude", "class Least").replace('"magnitude"', '"least"')
    added = added.replace("def global_zeros", "def least_zeros").replace("global_zeros(", "least_zeros(")
    assert added != source
    (copy / "stages/pruning/least.py").write_text(added)
    schema = copy / "stages/job/params.py"
    text = schema.read_text().replace(
        "from stages.pruning.magnitude",
        "from stages.pruning.least import Least\nfrom stages.pruning.magnitude",
    )
    text, count = re.subn(r"Magnitude \| Wanda", "Magnitude | Least | Wanda", text)
    assert count == 1
    schema.write_text(text)
    assert sweep.repro(copy) == {"code", "validate"}
    sweep.edit(copy, "prune.magnitude-50.method", "least")
    sweep.prunequant(copy, "check")
    assert sweep.repro(copy, "prune@magnitude-50") == {"validate", "prune@magnitude-50"}


def test_a_suite_more_makes_only_itself_stale(copy):
    suites = project.read(copy)["suites"]["graded"]
    values = project.read(copy)
    values["datasets"]["sums"] = values["datasets"]["arithmetic"]
    values["suites"]["graded"]["sums"] = suites["arithmetic"]
    project.write(copy, values)
    added = {f"graded@{candidate}-sums" for candidate in sweep.CANDIDATES}
    assert sweep.status(copy) == {"validate", "dataset@sums", "report", *added}


def test_the_lock_file_makes_everything_stale(copy):
    with (copy / "requirements.lock").open("a") as file:
        file.write("# changed\n")
    assert sweep.status(copy) == sweep.STAGES - {"code"}


def test_editing_a_shared_module_makes_its_users_stale(copy):
    code(copy, "stages/core/tables.py")
    assert sweep.repro(copy, "code") == {"code"}
    assert sweep.status(copy) == {*EVALUATIONS, "report", "validate"}
    code(copy, "stages/model/grid.py")
    assert sweep.repro(copy, "code") == {"code"}
    kinds = ("model@", "prune@", "quantize@", "finetune@")
    walked = {name for name in sweep.STAGES if name.startswith(kinds)}
    assert sweep.status(copy) == {*EVALUATIONS, "report", "validate", *walked}


def test_the_committed_lock_knows_the_code():
    """`dvc repro code` after an edit in stages/, and a commit of dvc.lock, keep it so."""
    done = project.run(project.ROOT, "dvc", "--wait-for-lock", "status", "--json", "code")
    status = json.loads(done.stdout)
    changes = [change for entry in status.get("code", []) for change in entry]
    assert "changed deps" not in changes and "changed command" not in changes


@pytest.mark.drill
def test_two_clones_make_the_same_bytes(finished, tmp_path):
    again = tmp_path / "again"
    project.run(tmp_path, "git", "clone", "-q", str(finished), str(again))
    (again / "dvc.lock").unlink()
    targets = (
        "prune",
        "finetune",
        "results/quantize/gptq-w4g32/news",
        "results/quantize/gptq-w4g32/arithmetic",
    )
    sweep.prunequant(again, "run", *targets)
    assert set(sweep.outcomes(again).values()) == {"ran"}
    created, before = outs(again), outs(finished)
    assert len(created) >= 10
    assert created == {path: before[path] for path in created}

"""What runs again and what does not, on a tiny model, with real stages."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from stages.job import provenance
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


AFTER = """
import sys
from dvc import cli
from dvc.stage import run
command = run.cmd_run
def cmd_run(*args, **options):
    command(*args, **options)
    exec(open("edit.txt").read())
run.cmd_run = cmd_run
sys.exit(cli.main(sys.argv[1:]))
"""
"""DVC, with an edit between the end of a stage's command and the hashing of its inputs."""


def write_edit(folder: Path, file: str, before: str, after: str) -> None:
    """Write code that edits a file, to be run at the right moment."""
    (folder / "edit.txt").write_text(
        f"import pathlib; file = pathlib.Path({file!r})\n"
        f"file.write_text(file.read_text().replace({before!r}, {after!r}))\n"
    )


@pytest.mark.drill
@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("params.yaml", "steps: 3", "steps: 4"),
        ("stages/recovery/lora.py", "import annotations\n", "import annotations\n_changed = True\n"),
    ],
)
def test_an_edit_while_a_stage_runs_locks_nothing(file, before, after, copy):
    write_edit(copy, file, before, after)
    door = copy / "stages/finetune.py"
    door.write_text(
        door.read_text().replace("    run.start()\n", "    exec(open('edit.txt').read())\n    run.start()\n")
    )
    sweep.edit(copy, "finetune.wanda-50-lora.steps", 3)
    sweep.repro(copy, "code", "validate")
    before_edit = outs(copy)
    done = project.run(copy, "dvc", "repro", "finetune@wanda-50-lora", ok=False)
    assert done.returncode and f"{file} changed while this stage ran" in done.stderr
    assert "`dvc checkout data/models/finetune/wanda-50-lora" in done.stderr
    assert outs(copy) == before_edit
    (copy / "edit.txt").write_text("")
    sweep.prunequant(copy, "run")
    assert sweep.status(copy) == set() and agrees(copy)


def agrees(folder: Path) -> bool:
    """Tell whether every result was computed from what dvc.lock says, as another process sees it."""
    code = "from stages.job import provenance as p; print(p.disagreements(p.locked_stages()))"
    return project.run(folder, sys.executable, "-c", code).stdout.strip() == "{}"


@pytest.mark.drill
def test_an_edit_just_after_a_stage_is_noticed_and_mended(copy):
    model = "data/models/quantize/gptq-w4g32"
    sweep.edit(copy, "quantize.gptq-w4g32.damping", 0.02)
    sweep.repro(copy, "validate")
    write_edit(copy, "params.yaml", "damping: 0.02", "damping: 0.5")
    project.run(copy, sys.executable, "-c", AFTER, "repro", "--single-item", "quantize@gptq-w4g32")
    wrong = outs(copy)[model]
    assert sweep.status(copy) >= {"perplexity@quantize/gptq-w4g32-news"} and not agrees(copy)
    done = project.run(copy, "dvc", "repro", "perplexity@quantize/gptq-w4g32-news", ok=False)
    assert done.returncode and "quantize@gptq-w4g32: quantize.gptq-w4g32 in params.yaml" in done.stderr
    refusal = (
        "dvc.lock lists other inputs than its result was computed from (quantize.gptq-w4g32 in params.yaml)"
    )
    assert refusal in sweep.prunequant(copy, "check", code=1)
    assert refusal in sweep.prunequant(copy, "run")
    assert sweep.status(copy) == set() and agrees(copy)
    right = outs(copy)[model]
    assert right != wrong
    # Nor does the run cache give the wrong result back.
    shutil.rmtree(copy / model)
    (copy / "dvc.lock").unlink()
    sweep.repro(copy)
    assert outs(copy)[model] == right and agrees(copy)


def test_results_older_than_the_lock_are_brought_up_to_date_and_not_distrusted(edited, tmp_path):
    """As after `git pull`: the lock is that of an edited recipe, the results are those of before."""
    folder = sweep.copy(edited[0], tmp_path / "project")
    project.run(folder, "git", "checkout", "-q", "HEAD~1", "--", "dvc.lock")
    project.run(folder, "dvc", "checkout", "--force", "quantize@gptq-w4g32")
    project.run(folder, "git", "checkout", "-q", "HEAD", "--", "dvc.lock")
    assert "quantize@gptq-w4g32" in sweep.status(folder) and agrees(folder)
    project.run(folder, "dvc", "checkout", "quantize@gptq-w4g32")
    assert "quantize@gptq-w4g32" not in sweep.status(folder) and agrees(folder)


@pytest.mark.drill
@pytest.mark.parametrize(
    "name", ["x'; touch pwned; '", "$(touch pwned)", "`touch pwned`", 'x"; touch pwned; "']
)
@pytest.mark.parametrize("section", ["prune", "models"])
def test_a_name_never_reaches_the_shell(copy, section, name):
    values = project.read(copy)
    values[section][name] = next(iter(values[section].values()))
    project.write(copy, values)
    stage = f"{'model' if section == 'models' else section}@{name}"
    done = project.run(copy, "dvc", "repro", "--single-item", stage, ok=False)
    assert done.returncode and "problem(s), nothing was run" in done.stderr
    assert not (copy / "pwned").exists()


@pytest.mark.drill
def test_removing_a_recipe_leaves_the_lock_of_a_fresh_clone(copy, tmp_path):
    values = project.read(copy)
    values["evaluate"]["candidates"].remove("quantize/gptq-w4g32")
    project.write(copy, values)
    sweep.prunequant(copy, "run")
    assert sweep.status(copy) == set()
    assert (copy / "data/removed/quantize/gptq-w4g32/news/scores.parquet").exists()
    report = outs(copy)["data/report"]
    again = tmp_path / "again"
    project.commit(copy, "fewer candidates")
    project.run(tmp_path, "git", "clone", "-q", str(copy), str(again))
    project.run(again, "dvc", "cache", "dir", "--local", str(copy / ".dvc/cache"))
    project.run(again, "dvc", "repro")
    assert outs(again)["data/report"] == report


def test_editing_a_recipe_runs_it_and_its_consumers(edited):
    folder, ran = edited
    assert ran == {
        "validate", "quantize@gptq-w4g32", "perplexity@quantize/gptq-w4g32-news",
        "graded@quantize/gptq-w4g32-arithmetic", "tidy", "report",
    }  # fmt: skip
    assert sweep.status(folder) == set()


def test_a_comment_runs_nothing(copy):
    for name in ("stages/prune.py", "stages/pruning/wanda.py", "stages/core/run.py"):
        comment(copy, name)
    assert sweep.status(copy) == {"code"}
    assert sweep.repro(copy) == {"code"}
    assert sweep.status(copy) == set()


@pytest.mark.drill
def test_after_an_edit_of_code_the_flow_starts_what_it_makes_stale(copy):
    comment(copy, "stages/pruning/wanda.py")
    output = sweep.prunequant(copy, "run")
    assert {name for name, state in sweep.outcomes(copy).items() if state != "unchanged"} == {"code"}
    assert "1 ran" in output
    logs = [log.name for log in (copy / "data/runs/logs").iterdir()]
    assert logs == ["code.log"]  # no process was started for any other stage
    code(copy, "stages/pruning/wanda.py")
    sweep.prunequant(copy, "run")
    logs = sorted(log.name for log in (copy / "data/runs/logs").iterdir())
    assert logs == ["code.log", "prune@wanda-50.log", "validate.log"]


def test_editing_a_methods_code_runs_its_recipes(copy):
    code(copy, "stages/pruning/wanda.py")
    # Until stage `code` has run, DVC cannot tell, and `check` says so.
    assert sweep.status(copy) == {"code"}
    assert "data/code does not know the code of prune/wanda" in sweep.prunequant(copy, "check")
    # The pruned model comes out the same, so its consumers are left alone; the schema checks params again.
    assert sweep.repro(copy) == {"code", "validate", "prune@wanda-50"}
    assert sweep.status(copy) == set()
    assert "does not know" not in sweep.prunequant(copy, "check")


@pytest.mark.drill
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
    assert sweep.status(copy) == {"validate", "dataset@sums", "tidy", "report", *added}


def test_editing_a_hypothesis_makes_the_report_alone_stale(copy):
    values = project.read(copy)
    sides = [{"weight": 1.0, "candidate": "prune/wanda-50"}, {"weight": -1.0, "candidate": "base/tiny"}]
    worse = {
        "test": "contrast", "claim": "Pruning loses.", "sides": sides, "expect": "above", "bound": 0.0,
        "readouts": [{"suite": "news", "metric": "perplexity"}],
    }  # fmt: skip
    values["studies"] = {
        "small": {"claim": "c", "source": "s", "profile": "laptop", "hypotheses": {"worse": worse}}
    }
    project.write(copy, values)
    assert sweep.status(copy) == {"validate", "report"}
    worse["bound"] = 0.1
    project.write(copy, values)
    assert sweep.status(copy) == {"validate", "report"}


def test_the_lock_file_makes_everything_stale(copy):
    with (copy / "requirements.lock").open("a") as file:
        file.write("# changed\n")
    assert sweep.status(copy) == sweep.STAGES - {"code"}


def test_editing_a_shared_module_makes_its_users_stale(copy):
    code(copy, "stages/core/tables.py")
    assert sweep.repro(copy, "code") == {"code"}
    assert sweep.status(copy) == {*EVALUATIONS, "report", "tidy", "validate"}
    code(copy, "stages/model/grid.py")
    assert sweep.repro(copy, "code") == {"code"}
    kinds = ("model@", "prune@", "quantize@", "finetune@")
    walked = {name for name in sweep.STAGES if name.startswith(kinds)}
    assert sweep.status(copy) == {*EVALUATIONS, "report", "tidy", "validate", *walked}


def test_the_committed_lock_knows_the_code():
    """`dvc repro code` after an edit in stages/, and a commit of dvc.lock, keep it so."""
    pytest.importorskip("dvc")
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


def test_a_stale_report_is_not_wrong_and_one_of_other_results_is(copy, monkeypatch):
    monkeypatch.chdir(copy)
    lock = provenance.locked_stages()
    (folder,) = [dep for dep in lock["report"]["deps"] if dep["path"] == "data/results"]
    assert provenance.folder_md5(Path("data/results")) == folder["md5"]
    name = "perplexity@base/tiny-news"
    other = {**lock[name], "outs": [{**out, "md5": f"{'0' * 32}.dir"} for out in lock[name]["outs"]]}
    # The lock names a result that the report did not read, though the folder is the one it names.
    assert provenance.disagreements({**lock, name: other}).keys() == {"report"}
    # The result has changed since the report: it is stale, as DVC knows.
    (copy / "data/results/base/tiny/news/more.json").write_text("{}")
    assert provenance.disagreements({**lock, name: other}) == {}


@pytest.mark.drill
def test_a_second_suite_and_a_profile_reach_the_report(copy):
    sweep.edit(copy, "suites.datasets", {"direct": "arithmetic"})
    sweep.edit(copy, "suites.graded.direct", {"shots": 0, "batch_size": 2})
    sweep.edit(copy, "profile.candidates", ["base/tiny"])
    added = {f"graded@{candidate}-direct" for candidate in sweep.CANDIDATES}
    ran = sweep.repro(copy)
    assert ran == {"validate", "alias@direct", "profile@base/tiny", "tidy", "report", *added}
    assert sweep.status(copy) == set()
    assert "base/tiny" in (copy / "data/report/profile.csv").read_text()
    metrics = (copy / "data/report/metrics.json").read_bytes()
    assert b'"direct"' in metrics
    project.run(copy, "dvc", "repro", "--force", "--single-item", "profile@base/tiny")
    assert sweep.repro(copy) == {"tidy", "report"}  # measured again, which no score depends on
    assert (copy / "data/report/metrics.json").read_bytes() == metrics
    sweep.edit(copy, "profile.candidates", [])
    sweep.edit(copy, "suites.graded", {"arithmetic": {"shots": 1, "batch_size": 2}})
    sweep.edit(copy, "suites.datasets", {})
    sweep.repro(copy)
    assert not (copy / "data/profile/base/tiny").exists()
    assert (copy / "data/removed/profile/base/tiny/profile.json").exists()
    assert sweep.status(copy) == set()

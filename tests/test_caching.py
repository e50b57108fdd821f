"""What runs again and what does not, on a tiny model, with real stages."""

import re
from pathlib import Path

import yaml

from tests import finished as sweep
from tests import project

EVALUATIONS = {name for name in sweep.STAGES if name.startswith(("perplexity@", "graded@"))}


def append(folder: Path, name: str) -> None:
    """Change a file without changing what it does."""
    with (folder / name).open("a") as file:
        file.write("# changed\n")


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


def test_editing_a_methods_file_runs_its_recipes(copy):
    append(copy, "stages/pruning/wanda.py")
    assert sweep.status(copy) == {"prune@wanda-50"}
    # Its consumers are looked at, and left alone, as the pruned model has come out the same.
    assert sweep.repro(copy) == {"prune@wanda-50"}


def test_adding_a_method_runs_nothing(copy):
    source = (copy / "stages/pruning/magnitude.py").read_text()
    added = source.replace("class Magnitude", "class Least").replace('"magnitude"', '"least"')
    assert added != source
    (copy / "stages/prune/least.py").write_text(added)
    names = copy / "stages/job/params.py"
    text = names.read_text().replace(
        "from stages.pruning.magnitude", "from stages.prune.least import Least\nfrom stages.pruning.magnitude"
    )
    text, count = re.subn(r"Magnitude \| Wanda", "Magnitude | Least | Wanda", text)
    assert count == 1
    names.write_text(text)
    assert sweep.status(copy) == set()
    sweep.edit(copy, "prune.magnitude-50.method", "least")
    sweep.prunequant(copy, "check")


def test_a_suite_more_makes_only_itself_stale(copy):
    suites = project.read(copy)["suites"]["graded"]
    values = project.read(copy)
    values["datasets"]["sums"] = values["datasets"]["arithmetic"]
    values["suites"]["graded"]["sums"] = suites["arithmetic"]
    project.write(copy, values)
    added = {f"graded@{candidate}-sums" for candidate in sweep.CANDIDATES}
    assert sweep.status(copy) == {"validate", "dataset@sums", "report", *added}


def test_the_lock_file_makes_everything_stale(copy):
    append(copy, "requirements.lock")
    assert sweep.status(copy) == sweep.STAGES


def test_a_core_module_makes_its_users_stale(copy):
    append(copy, "stages/core/tables.py")
    assert sweep.status(copy) == {*EVALUATIONS, "report"}
    append(copy, "stages/model/grid.py")
    walked = {
        name for name in sweep.STAGES if name.startswith(("model@", "prune@", "quantize@", "finetune@"))
    }
    assert sweep.status(copy) == {*EVALUATIONS, "report", *walked}


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
    made, before = outs(again), outs(finished)
    assert len(made) >= 10
    assert made == {path: before[path] for path in made}

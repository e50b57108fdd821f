"""What `prunequant diff` says of two revisions, and what it can say without the cache."""

import json

import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from flows import diff, tensors
from flows.show import show
from stages.core.tables import SAMPLE_COLUMNS, SCORE_COLUMNS, table
from stages.reporting.collect import Results
from tests import finished as sweep
from tests import project

MODEL = "data/models/quantize/gptq-w4g32"
MEASURE = {"suite": "s", "task": "t", "readout": "generation", "difficulty": "all", "metric": "exact_match"}


def scores(**values: float) -> pd.DataFrame:
    """Scores of `base/m` and the others, by the last part of their name."""
    names = {"m": "base/m", "again": "noise/again", "w": "prune/w"}
    rows = [
        {**MEASURE, "candidate": names[key], "value": value,
         "base": "m", "higher_is_better": True,
         "lineage": "base/m" if key == "m" else f"base/m > {names[key]}"}
        for key, value in values.items()
    ]  # fmt: skip
    return table(rows, SCORE_COLUMNS)


def samples(*rightness: float, target: str | None = "7") -> pd.DataFrame:
    """One item each, answered right (1) or wrong (0)."""
    rows = [
        {**MEASURE, "candidate": "base/m", "doc_id": i, "prompt_hash": f"h{i}", "target": target,
         "response": f"r{score}", "score": score}
        for i, score in enumerate(rightness)
    ]  # fmt: skip
    return table(rows, SAMPLE_COLUMNS)


def test_params_are_compared_by_key():
    old = {"a": {"b": 1, "gone": 2}, "same": [1]}
    new = {"a": {"b": 1.5}, "same": [1], "new": {"c": "x"}}
    assert list(diff.params(old, new)) == [
        {"key": "a.b", "old": 1, "new": 1.5},
        {"key": "a.gone", "old": 2, "new": None},
        {"key": "new.c", "old": None, "new": "x"},
    ]


def items(candidate: str, *rightness: float) -> pd.DataFrame:
    """One item each of `candidate`, answered right (1) or wrong (0)."""
    return samples(*rightness).assign(candidate=candidate)


def results(table: pd.DataFrame, *answers: pd.DataFrame) -> Results:
    return Results(table, pd.concat(answers) if answers else samples())


@pytest.mark.parametrize(
    ("new", "right", "verdict"),
    [
        (0.58, [1.0] * 58 + [0.0] * 42, "within noise"),  # inside the floor
        (0.7, [0.0, 1.0] * 10, "within noise"),  # outside, and as many items lost as won
        (0.9, [1.0] * 90 + [0.0] * 10, "better"),
        (0.1, [0.0] * 90 + [1.0] * 10, "worse"),
    ],
)
def test_a_changed_score_stands_beside_its_noise_floor_and_verdict(new, right, verdict):
    before = [1.0, 0.0] * (len(right) // 2)
    old = results(scores(m=0.5, again=0.6, w=0.5), items("prune/w", *before))
    (row,) = diff.score_changes(old, results(scores(m=0.5, again=0.6, w=new), items("prune/w", *right)))
    assert row["candidate"] == "prune/w"
    assert (row["old"], row["new"]) == (0.5, new)
    assert row["difference"] == pytest.approx(new - 0.5)
    assert row["noise_floor"] == pytest.approx(0.1)
    assert row["verdict"] == verdict


def test_p_values_are_corrected_over_all_scores_compared(capsys):
    before, after = [1.0] * 50 + [0.0] * 50, [1.0] * 44 + [0.0] * 56
    old = results(scores(m=0.5, w=0.5), items("base/m", *before), items("prune/w", *before))
    new = results(scores(m=0.5, w=0.44), items("base/m", *before), items("prune/w", *after))
    (row,) = diff.score_changes(old, new)
    assert (row["p"], row["p_corrected"]) == pytest.approx((1 / 64, 1 / 32))
    assert (row["family"], row["verdict"]) == (2, "worse")  # the unchanged score was compared as well
    empty = {"params": [], "artifacts": [], "flipped": [], "warnings": [], "missing": []}
    show(empty | {"revisions": ["a", "b"], "scores": [row]}, Console(width=200))
    assert "Holm's correction within the family of 2 overall scores compared" in capsys.readouterr().out


def test_without_items_a_change_is_untested():
    (row,) = diff.score_changes(results(scores(m=0.5)), results(scores(m=0.6)))
    assert (row["noise_floor"], row["p"], row["verdict"]) == (None, None, "untested")


def test_a_candidate_of_one_side_has_no_difference():
    old, new = results(scores(m=0.5, again=0.5)), results(scores(m=0.5, again=0.5, w=0.4))
    (row,) = diff.score_changes(old, new)
    assert (row["candidate"], row["old"], row["new"], row["difference"]) == ("prune/w", None, 0.4, None)
    assert row["verdict"] == ""


def test_flips_are_items_that_crossed():
    found = diff.flips(samples(1, 0, 1, 0), samples(1, 1, 0, 0))
    assert [(item["doc_id"], item["became"]) for item in found] == [(1, "right"), (2, "wrong")]
    assert (found[0]["response_old"], found[0]["response_new"]) == ("r0", "r1")
    assert diff.flips(samples(1, target=None), samples(0, target=None)) == []
    assert diff.flips(samples(0.25), samples(1)) == []  # a score that is neither right nor wrong


def test_tensors_are_compared_one_by_one(tmp_path):
    old = {"a": torch.zeros(4), "b": torch.ones(4), "gone": torch.ones(1), "codes": torch.tensor([1, 2])}
    new = {"a": torch.tensor([0, 0, 0, -2.0]), "b": torch.ones(4), "codes": torch.tensor([1, 3])}
    new |= {"new": torch.ones(1)}
    for name, values in (("old", old), ("new", new)):
        save_file(values, tmp_path / f"{name}.safetensors")
    found = tensors.compare([tmp_path / "old.safetensors"], [tmp_path / "new.safetensors"])
    assert (found["tensors"], found["changed"]) == (3, 2)
    assert (found["only_old"], found["only_new"], found["reshaped"]) == (["gone"], ["new"], [])
    assert found["largest"] == [
        {"name": "codes", "share": 0.5, "max_abs_difference": None},
        {"name": "a", "share": 0.25, "max_abs_difference": 2.0},
    ]


def test_a_real_edit_is_told_whole(edited):
    folder, _ = edited
    told = json.loads(sweep.prunequant(folder, "diff", "HEAD~1", "--json"))
    assert told["revisions"] == ["HEAD~1", "workspace"]
    assert told["params"] == [{"key": "quantize.gptq-w4g32.bits", "old": 4, "new": 3}]
    artifacts = {entry["path"]: entry for entry in told["artifacts"]}
    assert artifacts.keys() == {
        MODEL, "data/report", "data/results/quantize/gptq-w4g32/news",
        "data/results/quantize/gptq-w4g32/arithmetic",
    }  # fmt: skip
    assert artifacts[MODEL]["tensors"]["changed"] > 0
    assert {row["candidate"] for row in told["scores"]} <= {"quantize/gptq-w4g32"}
    assert (told["warnings"], told["missing"]) == ([], [])
    shown = sweep.prunequant(folder, "diff", "HEAD~1", "HEAD")
    assert "quantize.gptq-w4g32.bits" in shown
    assert "tensors" in shown
    same = sweep.prunequant(folder, "diff", "HEAD", "HEAD")
    assert "HEAD and HEAD: the same params, artifacts and scores." in same


def test_a_clone_without_the_cache_says_what_to_pull(edited, tmp_path):
    folder, clone = edited[0], tmp_path / "clone"
    project.run(tmp_path, "git", "clone", "-q", str(folder), str(clone))
    said = sweep.prunequant(clone, "diff", "HEAD~1")
    assert "quantize.gptq-w4g32.bits" in said
    commands = [line.strip() for line in said.splitlines() if line.startswith(("  git ", "  dvc "))]
    assert [command.split(" data/")[0] for command in commands] == [
        "git checkout --quiet --detach HEAD~1 && dvc fetch", "dvc pull",
    ]  # fmt: skip
    assert all(MODEL in command for command in commands)
    for command in commands:
        project.run(clone, "bash", "-c", command)
    whole = [sweep.prunequant(where, "diff", "HEAD~1", "--json") for where in (clone, folder)]
    assert whole[0] == whole[1]


def test_another_machine_is_warned_of():
    old, new = scores(m=0.5), scores(m=0.5)
    for side, threads in ((old, 1), (new, 2)):
        side["threads"] = threads
    assert diff.run_changes(old, new) == ["base/m on s: threads was 1, is 2"]


def test_an_unknown_revision_is_one_sentence(finished):
    said = sweep.prunequant(finished, "diff", "nowhere", code=2)
    assert said == "there is no revision 'nowhere'; give a commit, a branch, a tag or an experiment.\n"

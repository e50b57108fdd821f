"""`prunequant diff` between two revisions, with and without the cache."""

import io
import json

import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from flows.changes import causes, conditions, diff, revisions
from flows.changes.revisions import Revision
from flows.changes.show import show_diff
from flows.changes.tensors import compare_tensors
from stages.core import tables
from stages.model.grid import Integers
from stages.model.packed import tensors_of
from stages.reporting.collect import Results
from tests import finished as sweep
from tests import project
from tests.results import of_items, together

MODEL = "data/models/quantize/gptq-w4g32"
NOTHING = {
    "revisions": ["a", "b"],
    "tensors_compared": True,
    **{
        part: []
        for part in (
            "candidates", "params", "causes", "artifacts", "verdicts", "scores", "flipped", "incomparable",
            "missing", "uncompared",
        )
    },
}  # fmt: skip
"""A diff in which nothing differs."""
ITEMS = tables.table([], tables.ITEM_COLUMNS)
CANDIDATES = {"m": "base/m", "again": "noise/again", "w": "prune/w"}
GENERATED = {"readout": "generation", "metric": "exact_match"}


def results(values: dict[str, float], items: dict[str, list[float]] | None = None) -> Results:
    """Return scores by candidate, and items answered right (1) or wrong (0), which need not match them."""
    scores, samples = (
        of_items({CANDIDATES[name]: row for name, row in rows.items()}, **GENERATED)
        for rows in ({name: [value] for name, value in values.items()}, items or {"m": [1.0]})
    )
    return Results(scores.scores, samples.samples)


def samples(*rightness: float, **columns: object) -> pd.DataFrame:
    """Return items of `base/m`, answered right (1) or wrong (0)."""
    return of_items({"base/m": list(rightness)}, **GENERATED).samples.assign(**columns)


def test_outputs_of_recipes_that_params_no_longer_name_are_not_compared():
    params = {
        "models": {"m": {}}, "datasets": {"news": {}}, "prune": {"w": {}}, "finetune": {"l": {}},
        "teach": {"lesson": {}}, "suites": {"perplexity": {"news": {}}},
        "evaluate": {"candidates": ["base/m"]}, "profile": {"candidates": ["base/m"]},
    }  # fmt: skip
    named = (
        "datasets/none", "datasets/news", "datasets/lesson", "models/base/m", "models/prune/w",
        "results/base/m/news", "curves/l.csv", "profile/base/m", "report",
    )  # fmt: skip
    removed = (
        "datasets/old", "models/prune/old", "results/prune/w/news", "results/base/m/old", "curves/old.csv",
        "profile/prune/w", "provenance/prune/w.json",
    )  # fmt: skip
    assert all(revisions.is_named(f"data/{out}", params) for out in named)
    assert not any(revisions.is_named(f"data/{out}", params) for out in removed)
    assert not any(revisions.is_named(f"data/{out}", {}) for out in (*named[1:-1], *removed))


def test_params_are_compared_by_key():
    old = {"a": {"b": 1, "gone": 2}, "same": [1]}
    new = {"a": {"b": 1.5}, "same": [1], "new": {"c": "x"}}
    assert list(causes.param_changes(old, new)) == [
        {"key": "a.b", "old": 1, "new": 1.5},
        {"key": "a.gone", "old": 2, "new": None},
        {"key": "new.c", "old": None, "new": "x"},
    ]


@pytest.mark.parametrize(
    ("new", "right", "verdict"),
    [
        (0.58, [1.0] * 58 + [0.0] * 42, "below noise"),
        (0.7, [0.0, 1.0] * 10, "not settled"),  # outside, and as many items lost as won
        (0.9, [1.0] * 90 + [0.0] * 10, "better"),
        (0.1, [0.0] * 90 + [1.0] * 10, "worse"),
    ],
)
def test_a_changed_score_stands_beside_its_noise_and_verdict(new, right, verdict):
    before = [1.0, 0.0] * (len(right) // 2)
    old = results({"m": 0.5, "again": 0.6, "w": 0.5}, {"w": before})
    (row,) = diff.score_changes(old, results({"m": 0.5, "again": 0.6, "w": new}, {"w": right}))
    assert row["candidate"] == "prune/w"
    assert (row["old"], row["new"]) == (0.5, new)
    assert row["difference"] == pytest.approx(new - 0.5)
    assert row["noise"] == pytest.approx(0.1)
    assert row["verdict"] == verdict


def test_p_values_are_corrected_over_all_scores_compared(capsys):
    before, after = [1.0] * 50 + [0.0] * 50, [1.0] * 44 + [0.0] * 56
    old = results({"m": 0.5, "w": 0.5}, {"m": before, "w": before})
    new = results({"m": 0.5, "w": 0.44}, {"m": before, "w": after})
    (row,) = diff.score_changes(old, new)
    assert (row["p"], row["p_corrected"]) == pytest.approx((1 / 64, 1 / 32))
    assert (row["family"], row["verdict"]) == (2, "worse")  # the unchanged score was compared as well
    show_diff(NOTHING | {"scores": [row]}, Console(width=200))
    assert "Holm's correction over the 2 headline scores compared" in capsys.readouterr().out


def test_without_items_a_change_is_untested():
    old, new = (
        Results(table.scores, table.samples.head(0)) for table in (results({"m": 0.5}), results({"m": 0.6}))
    )
    (row,) = diff.score_changes(old, new)
    assert (row["noise"], row["p"], row["verdict"]) == (None, None, "untested")


def test_a_candidate_of_one_side_has_no_difference():
    old, new = results({"m": 0.5, "again": 0.5}), results({"m": 0.5, "again": 0.5, "w": 0.4})
    (row,) = diff.score_changes(old, new)
    assert (row["candidate"], row["old"], row["new"], row["difference"]) == ("prune/w", None, 0.4, None)
    assert row["verdict"] == ""


def test_measures_of_one_metric_are_kept_apart():
    def at(long: float, short: float) -> Results:
        thinking = GENERATED | {"metric": "pass@1", "counted": "exact_match"}
        return together(
            of_items({"base/m": [long] * 9}, **thinking, budget=64),
            of_items({"base/m": [short] * 9}, **thinking, budget=8),
            of_items({"base/m": [1.0] * 9}, **GENERATED, filter="strict"),
            of_items({"base/m": [short] * 9}, **GENERATED, filter="loose"),
        )

    rows = diff.score_changes(at(1.0, 1.0), at(1.0, 0.0))
    assert {row["label"]: (row["old"], row["new"], row["verdict"]) for row in rows} == {
        "pass@1, budget 8": (1, 0, ""), "exact_match, loose": (1, 0, ""),  # exact_match, strict is headline
    }  # fmt: skip
    assert {row["family"] for row in rows} == {0}
    flipped = diff.flipped_items(at(1.0, 1.0).samples, at(1.0, 0.0).samples, ITEMS)
    assert [(item["filter"], item["budget"]) for item in flipped] == [(None, 8)] * 9 + [("loose", None)] * 9


def test_turned_verdicts_come_with_the_reason():
    old = {
        "s": {"a": {"verdict": "undecided", "why": "w"}, "b": {"verdict": "supported"}, "c": {"verdict": "x"}}
    }
    new = {"s": {"a": {"verdict": "supported", "why": "now"}, "b": {"verdict": "supported", "p": 1}}}
    new["t"] = {"d": {"verdict": "contradicted", "why": "new"}}
    turned = diff.verdict_changes(old, new)
    assert turned == [
        {"study": "s", "hypothesis": "a", "old": "undecided", "new": "supported", "why": "now"},
        {"study": "s", "hypothesis": "c", "old": "x", "new": None, "why": None},
        {"study": "t", "hypothesis": "d", "old": None, "new": "contradicted", "why": "new"},
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    show_diff(NOTHING | {"verdicts": turned}, console)
    shown = console.export_text()
    assert "s: a" in shown and "undecided" in shown and "now" in shown
    assert "the same params" not in shown


def test_flips_are_items_that_crossed():
    flipped = diff.flipped_items(samples(1, 0, 1, 0), samples(1, 1, 0, 0), ITEMS)
    assert [(item["doc_id"], item["became"]) for item in flipped] == [(1, "right"), (2, "wrong")]
    assert (flipped[0]["response_old"], flipped[0]["response_new"]) == ("0", "1")
    assert diff.flipped_items(samples(1, target=None), samples(0, target=None), ITEMS) == []
    assert (
        diff.flipped_items(samples(0.25), samples(1), ITEMS) == []
    )  # a score that is neither right nor wrong


def test_draws_flip_each_by_itself():
    old, new = (pd.concat([samples(first, draw=0), samples(1, draw=1)]) for first in (0, 1))
    assert [(item["draw"], item["became"]) for item in diff.flipped_items(old, new, ITEMS)] == [(0, "right")]


class Stored(Revision):
    """A revision whose files lie in a folder."""

    def _files(self, out):
        return {file.name: file for file in (self.cache / out).iterdir()}


def test_tables_of_older_revisions_lack_columns(tmp_path):
    """Columns that an older schema lacks are empty, and a text in the place of a list does not matter."""
    out = "data/results/base/m/s"
    added = ["source", "counted", "filter"]
    for name, value in (("old", 0.0), ("new", 1.0)):
        table = of_items({"base/m": [value] * 9, "noise/n": [0.0] * 9}, **GENERATED)
        if name == "old":
            table = Results(
                table.scores.drop(columns=added).assign(lineage="base/m > noise/n", base_grid="none"),
                table.samples.drop(columns=added[1:]),
            )
        folder = tmp_path / name / out
        folder.mkdir(parents=True)
        tables.write_tables(folder, table.scores, table.samples)
    old, new = (Stored(name, {}, {out: {"md5": name}}, tmp_path / name) for name in ("old", "new"))
    sides = [diff.read_results(revision, [out]) for revision in (old, new)]
    assert sides[0].scores.dtypes.equals(sides[1].scores.dtypes)
    (row,) = diff.score_changes(*sides)
    assert (row["candidate"], row["old"], row["new"], row["verdict"]) == ("base/m", 0, 1, "below noise")
    assert len(diff.flipped_items(*(side.samples for side in sides), ITEMS)) == 9


def test_tensors_are_compared_one_by_one(tmp_path):
    old = {"a": torch.zeros(4), "b": torch.ones(4), "gone": torch.ones(1), "codes": torch.tensor([1, 2])}
    new = {"a": torch.tensor([0, 0, 0, -2.0]), "b": torch.tensor([1, 1, 1, 0.0]), "new": torch.ones(1)}
    new |= {"codes": torch.tensor([1, 3])}
    files = []
    for name, values in (("old", old), ("new", new)):
        save_file(values, tmp_path / f"{name}.safetensors")
        files.append({"model.safetensors": tmp_path / f"{name}.safetensors"})
    differences = compare_tensors(*files)
    assert (differences["tensors"], differences["changed"]) == (3, 3)
    assert [differences[key] for key in ("only_old", "only_new", "reshaped")] == [["gone"], ["new"], []]
    assert [(row["name"], row["change"], row["zeros_gained"]) for row in differences["largest"]] == [
        ("b", 0.5, 1), ("codes", None, 0), ("a", None, 0),
    ]  # fmt: skip
    assert (differences["zeros_gained"], differences["zeros_lost"]) == (1, 1)
    assert differences["change"] == pytest.approx(5**0.5 / 2)


def test_a_packed_model_is_compared_as_the_weights_it_stands_for(tmp_path):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 0
    code = Integers(bits=4, group_size=32).nearest(weight)
    scheme = code.scheme()
    stored = {"config_groups": {"group_0": scheme}, "format": scheme["format"]}
    checkpoints = {
        "dense": ({}, {"layers.3.up.weight": weight}),
        "packed": ({"quantization_config": stored}, tensors_of("layers.3.up", code)),
    }
    files = []
    for name, (config, weights) in checkpoints.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / f"{name}.safetensors")
        files.append(
            {
                "config.json": tmp_path / f"{name}.json",
                "model.safetensors": tmp_path / f"{name}.safetensors",
            }
        )
    differences = compare_tensors(*files)
    read = code.dequantize()
    (block,) = differences["blocks"]
    assert not differences["reshaped"] and not differences["only_old"] and not differences["only_new"]
    assert block["block"] == "layers.3"
    assert block["change"] == pytest.approx(float((read - weight).norm() / weight.norm()), rel=1e-6)
    assert block["zeros_gained"] == int((read == 0).sum()) - 1 > 0 and block["zeros_lost"] == 0


@pytest.mark.drill
def test_a_real_edit_is_shown_whole(edited):
    folder, _ = edited
    changes = json.loads(sweep.prunequant(folder, "diff", "HEAD~1", "--json"))
    assert changes["revisions"] == ["HEAD~1", "workspace"]
    assert changes["params"] == [{"key": "quantize.gptq-w4g32.bits", "old": 4, "new": 3}]
    artifacts = {entry["path"]: entry for entry in changes["artifacts"]}
    assert artifacts.keys() == {
        MODEL, "data/report", "data/results/quantize/gptq-w4g32/news",
        "data/results/quantize/gptq-w4g32/arithmetic",
    }  # fmt: skip
    assert artifacts[MODEL]["tensors"]["changed"] > 0
    assert {row["candidate"] for row in changes["scores"]} <= {"quantize/gptq-w4g32"}
    assert (changes["incomparable"], changes["missing"]) == ([], [])
    (cause,) = changes["causes"]
    assert (
        cause["stages"] == ["quantize@gptq-w4g32", "report", "tidy"]
        or cause["stages"][0] == "quantize@gptq-w4g32"
    )
    assert MODEL in cause["artifacts"] and not cause["waiting"]
    shown = sweep.prunequant(folder, "diff", "HEAD~1", "HEAD")
    assert "quantize.gptq-w4g32.bits" in shown
    assert "tensors" in shown
    same = sweep.prunequant(folder, "diff", "HEAD", "HEAD")
    assert "HEAD and HEAD: the same params, artifacts and scores." in same


@pytest.mark.drill
def test_a_clone_without_the_cache_says_what_to_fetch(edited, tmp_path):
    folder, clone = edited[0], tmp_path / "clone"
    project.run(folder, "dvc", "push", "-q", "--all-commits")
    project.run(tmp_path, "git", "clone", "-q", str(folder), str(clone))
    before = project.run(clone, "git", "status", "--porcelain").stdout
    output = sweep.prunequant(clone, "diff", "HEAD~1")
    assert "quantize.gptq-w4g32.bits" in output
    assert "  prunequant diff 'HEAD~1' --fetch all\n" in output
    scores = json.loads(sweep.prunequant(clone, "diff", "HEAD~1", "--fetch", "results", "--json"))
    (old, new) = scores["missing"]
    assert [out["path"] for out in old["outputs"]] == [out["path"] for out in new["outputs"]] == [MODEL]
    assert old["outputs"][0]["bytes"] > 0 and old["commands"] == ["prunequant diff 'HEAD~1' --fetch all"]
    sweep.prunequant(clone, "diff", "HEAD~1", "--fetch", "all")
    whole = [sweep.prunequant(where, "diff", "HEAD~1", "--json") for where in (clone, folder)]
    assert whole[0] == whole[1] and json.loads(whole[0])["scores"] == scores["scores"]
    assert not (clone / "data/models").exists(), "the workspace is not touched"
    assert project.run(clone, "git", "status", "--porcelain").stdout == before
    lost = sweep.prunequant(clone, "diff", "HEAD~1", "--fetch", "all", "--remote", "nowhere")
    assert "nowhere" not in lost, "nothing is left to fetch"


def test_different_conditions_are_named_once():
    scores = together(results({"m": 0.5}), results({"w": 0.5})).scores
    sides = (scores.assign(threads=1, prompt_hash="a"), scores.assign(threads=2, prompt_hash="b"))
    deps = [[{"path": path, "md5": md5} for path in ("data/datasets/s", "requirements.lock")] for md5 in "ab"]
    old, new = (
        Revision(
            name, {}, {}, None, {"e": {"deps": dep, "outs": [{"path": "data/results/base/m/s"}]}}, versions
        )
        for name, dep, versions in zip("ab", deps, ("torch==1\nrich==1", "torch==2\nrich==1"), strict=True)
    )
    rows = conditions.incomparable(old, new, sides, [], [("base/m on s", "base/m/s", "base/m/s")])
    both = ["base/m on s", "prune/w on s"]
    assert rows == [
        {"kind": "data", "because": "data/datasets/s differs", "of": both[:1]},
        {"kind": "data", "because": "the prompts differ", "of": both},
        {"kind": "settings", "because": "threads was 1, is 2", "of": both},
        {"kind": "versions", "because": "torch was 1, is 2", "of": both[:1]},
    ]


def test_models_computed_on_other_machines_are_told(tmp_path):
    sides = []
    for name, cpu in (("old", "AVX2"), ("new", "AVX512")):
        folder = tmp_path / name / "data/models/base/m"
        folder.mkdir(parents=True)
        record = {"numerics": {"cpu_capability": cpu, "torch": "2", "threads": 1}}
        (folder / "artifact.json").write_text(json.dumps(record))
        sides.append(Stored(name, {}, {"data/models/base/m": {"md5": name}}, tmp_path / name))
    none = results({"m": 0.5}).scores.head(0)
    assert conditions.incomparable(*sides, (none, none), [("base/m", "base/m")], []) == [
        {"kind": "machine", "because": "cpu_capability was AVX2, is AVX512", "of": ["base/m"]}
    ]


def revision(bits: int, md5: str, code: str = "c", ran: int | None = None) -> Revision:
    """Return a side with one quantized model, one evaluation of it and a report."""

    def entry(out: str, deps: dict[str, str], params: dict[str, object]) -> dict[str, object]:
        inputs = [{"path": path, "md5": of} for path, of in deps.items()]
        return {"deps": inputs, "params": {"params.yaml": params}, "outs": [{"path": out, "md5": md5}]}

    model, result = "data/models/quantize/q", "data/results/quantize/q/s"
    stages = {
        "quantize@q": entry(model, {"data/code/quantize/rtn": code}, {"quantize.q": {"bits": ran or bits}}),
        "graded@quantize/q-s": entry(result, {model: md5}, {}),
        "report": entry("data/report", {"data/results": md5}, {}),
    }
    outs = {path: {"md5": md5} for path in (model, result, "data/report")}
    return Revision("r", {"quantize": {"q": {"bits": bits}}}, outs, None, stages)


def test_a_cause_names_what_was_made_again():
    (row,) = causes.causes(revision(4, "a"), revision(3, "b"))
    assert (row["kind"], row["cause"], row["stages"]) == ("param", "quantize.q.bits", ["quantize@q"])
    assert row["then"] == ["graded@quantize/q-s", "report"] and row["waiting"] == []
    assert row["artifacts"] == ["data/models/quantize/q", "data/report", "data/results/quantize/q/s"]
    (code,) = causes.causes(revision(4, "a"), revision(4, "b", code="d"))
    assert (code["kind"], code["cause"], len(code["then"])) == ("code", "quantize/rtn", 2)
    (edit,) = causes.causes(revision(4, "a"), revision(3, "a", ran=4))
    assert (edit["stages"], edit["artifacts"], edit["waiting"]) == ([], [], ["quantize@q"])


@pytest.mark.drill
def test_an_unknown_revision_is_one_sentence(finished):
    output = sweep.prunequant(finished, "diff", "nowhere", code=2)
    assert output == "there is no revision 'nowhere'; give a commit, a branch, a tag or an experiment.\n"

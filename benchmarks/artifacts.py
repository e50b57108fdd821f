"""Hash every kind of artifact: run this before and after a change that should change none, and compare.

Apply every method, allocation, importance, metric and fine-tuning arm to tiny models, through the stage
functions in a single process. Then print the sha256 of every file under `data/`, of result tables by column.

    python -m benchmarks.artifacts > before.txt    # in the checkout before the change
    python -m benchmarks.artifacts > after.txt     # in the checkout after it, on the same machine
    diff before.txt after.txt                      # prints nothing if no artifact has changed

Name families as arguments (`llama opt`) to make only theirs.
"""

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.figures import show
from stages.job import lineage
from stages.job.load import checked_params
from stages.job.params import Params
from tests import families, pipeline, project

Settings = dict[str, Any]
Recipes = dict[str, Settings]

BASE = "base/tiny"
NONE: Settings = {"dataset": "none"}
TEXT: Settings = {"dataset": "news", "num_samples": 4, "sequence_length": 32}
BLOCK = TEXT | {"sequential": "block"}
DENSE = TEXT | {"sequential": "none", "batch_size": 2}
GENERATED = TEXT | {"tokens": "generated", "seed": 3, "temperature": 1.0, "prompt_length": 8}
RANDOM = TEXT | {"dataset": "none", "tokens": "random", "seed": 5}
MEASURED = ("activation", "llm-bip")
"""The importances that read text."""
INT4 = {"bits": 4, "group_size": 16}
LEVELS: dict[str, list[Settings]] = {
    "arithmetic": [
        {"name": "add", "operator": "+", "digits": 1, "carries": False},
        {"name": "carry", "operator": "+", "digits": 2, "carries": True},
    ],
    "brackets": [{"name": "two", "depth": 2, "kinds": 2}, {"name": "three", "depth": 3, "closed": 1}],
    "letters": [{"name": "alone", "others": 2}, {"name": "words", "length": 5, "words": 2}],
    "sorting": [{"name": "two", "words": 2}, {"name": "four", "words": 4, "shared": 1}],
    "classification": [{"name": "four", "chains": 4}, {"name": "chains", "chains": 4, "rules": 2}],
    "instructions": [{"name": "one", "constraints": 1}, {"name": "three", "constraints": 3}],
}
"""The levels of each graded task."""
FEW = (
    "wanda-linear", "wanda-block", "sparsegpt-linear", "width-l2", "depth-block-influence-block",
    "magnitude-global", "gptq-w4", "awq", "rtn-w4", "smoothquant", "lora-mask", "full-mask",
)  # fmt: skip
"""The recipes of families other than Llama."""
UNHASHED = ("runs", "scratch", "code", "validated.json")


def recipe(method: str, source: str = BASE, /, **settings: Any) -> Settings:
    """Return a recipe of `method` on `source`."""
    return {"source": source, "method": method, **settings}


def prune_recipes() -> Recipes:
    """Return recipes of every pruning method."""
    recipes: Recipes = {}
    for scope in ("global", "matrix", "row"):
        recipes[f"magnitude-{scope}"] = recipe("magnitude", sparsity=0.37, scope=scope, calibration=NONE)
    half = {"sparsity": 0.5, "structure": "2:4"}
    recipes["magnitude-2of4"] = recipe("magnitude", **half, scope="row", calibration=NONE)
    texts = {"linear": TEXT, "block": BLOCK, "none": DENSE, "generated": GENERATED, "random": RANDOM}
    for name, text in texts.items():
        for method in ("wanda", "sparsegpt"):
            recipes[f"{method}-{name}"] = recipe(method, sparsity=0.5, calibration=text)
    for allocation in (
        {"kind": "erk"}, {"kind": "owl", "multiple": 3.0}, {"kind": "alpha", "spread": 0.2},
        {"kind": "layer-if"},
    ):  # fmt: skip
        kind, spread = allocation["kind"], {"sparsity": 0.4, "allocation": allocation}
        text = TEXT if kind in ("owl", "layer-if") else NONE
        recipes[f"magnitude-{kind}"] = recipe("magnitude", **spread, scope="matrix", calibration=text)
        for method in ("wanda", "sparsegpt"):
            recipes[f"{method}-{kind}"] = recipe(method, **spread, calibration=TEXT)
    floors = {"kind": "uniform", "floor_rows": True}
    recipes["wanda-floor-rows"] = recipe("wanda", sparsity=0.37, allocation=floors, calibration=TEXT)
    for method in ("wanda", "sparsegpt"):
        recipes[f"{method}-2of4"] = recipe(method, **half, calibration=TEXT)
    recipes["sparsegpt-grid"] = recipe("sparsegpt", sparsity=0.5, grid=INT4, calibration=TEXT)
    recipes["random-50"] = recipe("random", sparsity=0.5, seed=7, calibration=NONE)

    def by_importance(importance: str) -> Settings:
        seed = {"seed": 1} if importance == "random" else {}
        return {"importance": importance, "calibration": TEXT if importance in MEASURED else NONE, **seed}

    for importance in ("ppm", "vow", "pon", "l2", "activation", "llm-bip", "random"):
        recipes[f"width-{importance}"] = recipe("width", remove=0.4, **by_importance(importance))
    for importance, unit in product(("magnitude", "activation", "llm-bip", "random"), ("groups", "queries")):
        settings = by_importance(importance)
        recipes[f"heads-{importance}-{unit}"] = recipe("heads", unit=unit, remove=0.5, **settings)
    metrics = ("block-influence", "angular", "reverse", "perplexity", "shapley", "greedy")
    for metric, target in product(metrics, ("block", "attention")):
        if (metric, target) != ("angular", "attention"):
            settings = {"calibration": NONE if metric == "reverse" else TEXT, "blocks": 1}
            settings |= {"samples": 3} if metric == "shapley" else {}
            recipes[f"depth-{metric}-{target}"] = recipe("depth", metric=metric, target=target, **settings)
    items = {"dataset": "arithmetic", "shots": 1}
    recipes["depth-items"] = recipe("depth", metric="greedy", blocks=1, calibration=items)
    rules = {"max_rise": 9.0, "held_out": 1, "policy": {"kind": "rules"}}
    recipes["stepwise"] = recipe("stepwise", sparsity=0.3, **rules, calibration=TEXT)
    for scope in ("row", "matrix"):
        recipes[f"resp-{scope}"] = recipe("resp", sparsity=0.5, scope=scope, steps=2, calibration=GENERATED)
    recipes["resp-structures"] = recipe("resp-structures", sparsity=0.5, steps=2, calibration=GENERATED)
    return recipes


def quantize_recipes() -> Recipes:
    """Return recipes of every quantization method."""
    int3 = {"bits": 3, "group_size": 16, "symmetric": False}
    static = INT4 | {"static_groups": True, "act_order": True}
    return {
        "rtn-w4": recipe("rtn", **INT4, calibration=NONE),
        "rtn-w3-channel": recipe("rtn", **int3 | {"group_size": None}, calibration=NONE),
        "gptq-w4": recipe("gptq", **INT4, calibration=TEXT),
        "gptq-w3-block": recipe("gptq", **int3, calibration=BLOCK),
        "gptq-static": recipe("gptq", **static, calibration=TEXT),
        "awq": recipe("awq", **INT4, calibration=BLOCK),
        "awq-clip": recipe("awq", **INT4, symmetric=False, clip=True, calibration=BLOCK),
        "smoothquant": recipe("smoothquant", calibration=BLOCK),
        "hqq": recipe("hqq", **INT4, calibration=NONE),
        "hqq-symmetric": recipe("hqq", **INT4, symmetric=True, calibration=NONE),
        "nf4": recipe("nf4", group_size=16, calibration=NONE),
        "nf4-double": recipe("nf4", group_size=16, double_quant=True, calibration=NONE),
        "fp8": recipe("fp8", calibration=NONE),
        "fp8-dynamic": recipe("fp8", strategy="tensor", activations="dynamic", calibration=NONE),
        "mxfp4": recipe("mxfp4", calibration=NONE),
        "nvfp4": recipe("nvfp4", calibration=NONE),
        "wanda-gptq": recipe("gptq", "prune/wanda-linear", **INT4, calibration=TEXT),
    }


def teach_recipes() -> Recipes:
    """Return a recipe of each way of teaching."""
    graded = {"dataset": "arithmetic", "num_samples": 6, "held_out": 4, "shots": 1, "max_new_tokens": 6}
    text = TEXT | {"held_out": 2, "top": 8}
    return {
        "taught-answers": recipe("answers", **graded, temperature=0.7, batch_size=2),
        "taught-logits": recipe("logits", **text, batch_size=2),
    }


def finetune_recipes() -> Recipes:
    """Return recipes of every fine-tuning method, on dense, pruned and quantized sources."""
    tune: Settings = {"train": TEXT, "learning_rate": 0.01, "steps": 3, "batch_size": 2}
    fast = tune | {"learning_rate": 0.1}
    lora = {"rank": 2, "alpha": 4} | tune
    small = {"sparsity": 0.5, "scope": "row"}
    pruned, quantized = "prune/wanda-linear", "quantize/wanda-gptq"
    recipes: Recipes = {}
    for keep in ("mask", "none"):
        recipes[f"lora-{keep}"] = recipe("lora", pruned, keep=keep, **lora)
        recipes[f"full-{keep}"] = recipe("full", pruned, keep=keep, weight_decay=0.1, **tune)
        for method in ("qat", "eco"):
            recipes[f"{method}-{keep}"] = recipe(method, quantized, keep=keep, **fast)
    recipes["eco-sgd"] = recipe("eco", "quantize/rtn-w4", optimizer="sgd", **tune | {"learning_rate": 1.0})
    for keep, scope in product(("small", "shuffled"), ("matrix", "global", "row")):
        recipes[f"full-{keep}-{scope}"] = recipe("full", keep=keep, small=small | {"scope": scope}, **tune)
    recipes["lora-shuffled"] = recipe("lora", keep="shuffled", small=small, **lora)
    recipes["lora-requantize"] = recipe("lora", "quantize/gptq-w4", requantize=True, **lora)

    def on(dataset: str, **settings: Any) -> Settings:
        return {"train": {"dataset": dataset, "num_samples": 4, "held_out": 2, **settings}}

    packed = on("arithmetic", num_samples=6, held_out=4, sequence_length=64, packing=True)
    recipes["full-packed"] = recipe("full", **tune | packed, accumulation=2)
    recipes["lora-answers"] = recipe("lora", pruned, **lora | on("taught-answers", sequence_length=64))
    logits = on("taught-logits", sequence_length=32) | {"distillation": {"weight": 0.5, "temperature": 2.0}}
    recipes["full-distilled"] = recipe("full", pruned, **tune | logits)
    return recipes


def params(family: str, inputs: Path) -> dict[str, Any]:
    """Return params.yaml for a family: for Llama with every recipe and candidate, for others with a few."""
    raw = project.params(inputs)
    raw["models"]["tiny"] |= {
        "source": f"path:{inputs / family}", "in_features": families.IN_FEATURES[family],
        "sha256": project.sha256(inputs / family),
    }  # fmt: skip
    sizes = {"seed": 0, "test": 4, "train": 4, "fewshot": 1}
    raw["datasets"] |= {kind: {"kind": kind, **sizes, "levels": levels} for kind, levels in LEVELS.items()}
    sections = {
        "prune": prune_recipes(), "quantize": quantize_recipes(), "teach": teach_recipes(),
        "finetune": finetune_recipes(), "noise": {}, "floor": {},
    }  # fmt: skip
    candidates = [BASE]
    if family == "llama":
        sections["noise"] = {
            "batch": {"source": BASE, "batch_size": 3}, "fp32": {"source": BASE, "dtype": "float32"},
        }  # fmt: skip
        sections["floor"] = {"dot": {"source": BASE, "responder": "dot"}}
        candidates += [
            "noise/batch", "noise/fp32", "floor/dot", "prune/wanda-linear", "quantize/gptq-w4",
            "quantize/smoothquant", "finetune/lora-mask",
        ]  # fmt: skip
    else:
        for section, recipes in sections.items():
            sections[section] = {name: recipes[name] for name in recipes if name in FEW}
    if family == "gpt2":
        del sections["quantize"]["smoothquant"]  # refuses GPT-2
    emergence = {"windows": 64, "sequence_length": 4, "steps": 5, "width": 8}
    news = {"windows": 3, "sequence_length": 32, "batch_size": 2, "emergence": emergence}
    graded: Recipes = {kind: {"shots": 1, "batch_size": 2} for kind in LEVELS}
    graded["brackets"]["thinking"] = {"budgets": [0, 4, 8], "draws": 3, "temperature": 0.9, "waits": 1}
    suites = {"perplexity": {"news": news}, "graded": graded}
    profile = raw["profile"] | {"candidates": []}
    return raw | sections | {"suites": suites, "evaluate": {"candidates": candidates}, "profile": profile}


def make(raw: dict[str, Any]) -> None:
    """Run every stage of params in the working folder, each recipe after its sources; print failures."""
    params = checked_params(raw)

    def run(label: str, stage: Callable[[Params, str], None], name: str) -> None:
        try:
            stage(params, name)
        except Exception as error:
            show(f"{label}: {type(error).__name__}: {error}")

    pipeline.validate(params, "all")
    for name in (*(f"datasets/{key}" for key in params.datasets), *(f"base/{key}" for key in params.models)):
        run(f"download {name}", pipeline.download, name)
    todo = list(params.recipes())
    while todo:
        artifact = next(name for name in todo if not lineage.ancestors(params, name) & set(todo))
        section, name = artifact.split("/")
        run(artifact, pipeline.STAGES[section], name)
        todo.remove(artifact)
    for name in params.evaluations():
        run(f"evaluate {name}", pipeline.evaluate, name)
    run("report all", pipeline.report, "all")


def show_hashes(root: Path, label: str) -> None:
    """Print `<hash>  <label>/<file>` for every file under `root`, and for every column of a result table."""

    def line(content: bytes, name: str) -> None:
        show(f"{hashlib.sha256(content).hexdigest()[:16]}  {label}/{name}")

    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        if not file.is_file() or name.parts[0] in UNHASHED:
            continue
        if file.suffix == ".parquet" and name.parts[0] in ("results", "report"):
            for column, values in pd.read_parquet(file).items():
                line(json.dumps(values.tolist(), default=str).encode(), f"{name}:{column}")
        else:
            line(file.read_bytes(), str(name))


def main() -> None:
    """Make the artifacts of every family, or of those named as arguments, and print their hashes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "families", nargs="*", help=f"any of {', '.join(families.CONFIGS)}; none is all of them"
    )
    parser.add_argument("--device", default=families.DEVICE, help="run.device of params, such as cuda")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(families.CONFIGS):
        parser.error(
            f"there is no family {', '.join(sorted(unknown))}; allowed: {', '.join(families.CONFIGS)}"
        )
    families.DEVICE = arguments.device
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        for name, seed in (("news", 1), ("speeches", 2)):
            (inputs / f"{name}.txt").write_text(project.text(seed))
        for family in families.CONFIGS:
            families.save(family, inputs / family)
        (inputs / "tiny").symlink_to(inputs / "llama")
        for family in arguments.families or families.CONFIGS:
            folder = Path(scratch) / family
            folder.mkdir()
            (folder / "inputs").symlink_to(inputs)
            start = time.perf_counter()
            with chdir(folder):
                make(params(family, Path("inputs")))
                sys.stderr.write(f"{family}: {time.perf_counter() - start:.0f} s\n")
                show_hashes(Path("data"), family)


if __name__ == "__main__":
    main()

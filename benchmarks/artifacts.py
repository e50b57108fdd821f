"""The bytes of every artifact: run it before and after a change that should change none, and compare.

Every method, allocation, importance, metric and fine-tuning arm is applied to a tiny model, through the stage
functions, in one process; then every file under `data/` is printed with its sha256, a table with one hash a
column.

    python -m benchmarks.artifacts > before.txt    # in the checkout before the change
    python -m benchmarks.artifacts > after.txt     # in the one after it, on the same machine
    diff before.txt after.txt                      # prints nothing where nothing changed
"""

import hashlib
import json
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tests import families, project

TEXT: dict[str, Any] = {"dataset": "news", "num_samples": 4, "sequence_length": 32}
NONE = {"dataset": "none"}
DRAWN: tuple[dict[str, Any], ...] = ({}, {"seed": 1})
ORDERS: tuple[dict[str, Any], ...] = ({}, {"samples": 3})
SKIPPED = ("runs", "scratch", "code", "validated.json")


def recipes(source: str = "base/tiny") -> dict[str, dict[str, dict[str, Any]]]:
    """By section, every recipe tried on a gated model."""
    made: dict[str, dict[str, dict[str, Any]]] = {"prune": {}, "quantize": {}, "teach": {}, "finetune": {}}

    def add(section: str, name: str, method: str, at: str = source, /, **settings: Any) -> None:
        made[section][name] = {"source": at, "method": method, **settings}

    block, dense = TEXT | {"sequential": "block"}, TEXT | {"sequential": "none", "batch_size": 2}
    generated = TEXT | {"tokens": "generated", "seed": 3, "temperature": 1.0, "prompt_length": 8}
    noise = {"dataset": "none", "tokens": "random", "num_samples": 4, "sequence_length": 32, "seed": 5}
    for scope in ("global", "matrix", "row"):
        add("prune", f"magnitude-{scope}", "magnitude", sparsity=0.37, scope=scope, calibration=NONE)
    add("prune", "magnitude-2of4", "magnitude", sparsity=0.5, scope="row", structure="2:4", calibration=NONE)
    for name, text in {
        "linear": TEXT,
        "block": block,
        "none": dense,
        "generated": generated,
        "random": noise,
    }.items():
        add("prune", f"wanda-{name}", "wanda", sparsity=0.5, calibration=text)
        add("prune", f"sparsegpt-{name}", "sparsegpt", sparsity=0.5, calibration=text)
    kinds: dict[str, dict[str, Any]] = {
        "erk": {},
        "owl": {"multiple": 3.0},
        "alpha": {"spread": 0.2},
        "layer-if": {},
    }
    for kind, more in kinds.items():
        allocation = {"kind": kind, **more}
        text = TEXT if kind in ("owl", "layer-if") else NONE
        add(
            "prune",
            f"magnitude-{kind}",
            "magnitude",
            sparsity=0.4,
            scope="matrix",
            allocation=allocation,
            calibration=text,
        )
        add("prune", f"wanda-{kind}", "wanda", sparsity=0.4, allocation=allocation, calibration=TEXT)
        add("prune", f"sparsegpt-{kind}", "sparsegpt", sparsity=0.4, allocation=allocation, calibration=TEXT)
    floors = {"kind": "uniform", "floor_rows": True}
    add("prune", "wanda-floor-rows", "wanda", sparsity=0.37, allocation=floors, calibration=TEXT)
    add("prune", "wanda-2of4", "wanda", sparsity=0.5, structure="2:4", calibration=TEXT)
    add("prune", "sparsegpt-2of4", "sparsegpt", sparsity=0.5, structure="2:4", calibration=TEXT)
    grid = {"bits": 4, "group_size": 16}
    add("prune", "sparsegpt-grid", "sparsegpt", sparsity=0.5, grid=grid, calibration=TEXT)
    add("prune", "random-50", "random", sparsity=0.5, seed=7, calibration=NONE)
    for importance in ("ppm", "vow", "pon", "l2", "activation", "llm-bip", "random"):
        measured = importance in ("activation", "llm-bip")
        add(
            "prune",
            f"width-{importance}",
            "width",
            importance=importance,
            remove=0.4,
            calibration=TEXT if measured else NONE,
            **DRAWN[importance == "random"],
        )
    for importance, unit in itertools.product(
        ("magnitude", "activation", "llm-bip", "random"), ("groups", "queries")
    ):
        measured = importance in ("activation", "llm-bip")
        add(
            "prune",
            f"heads-{importance}-{unit}",
            "heads",
            importance=importance,
            unit=unit,
            remove=0.5,
            calibration=TEXT if measured else NONE,
            **DRAWN[importance == "random"],
        )
    for metric, target in itertools.product(
        ("block-influence", "angular", "reverse", "perplexity", "shapley", "greedy"), ("block", "attention")
    ):
        if (metric, target) != ("angular", "attention"):
            add(
                "prune",
                f"depth-{metric}-{target}",
                "depth",
                metric=metric,
                target=target,
                blocks=1,
                calibration=NONE if metric == "reverse" else TEXT,
                **ORDERS[metric == "shapley"],
            )
    add(
        "prune",
        "depth-items",
        "depth",
        metric="greedy",
        blocks=1,
        calibration={"dataset": "arithmetic", "shots": 1},
    )
    add(
        "prune",
        "stepwise",
        "stepwise",
        sparsity=0.3,
        max_rise=9.0,
        held_out=1,
        policy={"kind": "rules"},
        calibration=TEXT,
    )
    add("prune", "resp-row", "resp", sparsity=0.5, scope="row", steps=2, calibration=generated)
    add("prune", "resp-matrix", "resp", sparsity=0.5, scope="matrix", steps=2, calibration=generated)

    add("quantize", "rtn-w4", "rtn", bits=4, group_size=16, calibration=NONE)
    add("quantize", "rtn-w3-channel", "rtn", bits=3, group_size=None, symmetric=False, calibration=NONE)
    add("quantize", "gptq-w4", "gptq", bits=4, group_size=16, calibration=TEXT)
    add("quantize", "gptq-w3-block", "gptq", bits=3, group_size=16, symmetric=False, calibration=block)
    add(
        "quantize",
        "gptq-static",
        "gptq",
        bits=4,
        group_size=16,
        static_groups=True,
        act_order=True,
        calibration=TEXT,
    )
    add("quantize", "awq", "awq", bits=4, group_size=16, calibration=block)
    add("quantize", "awq-clip", "awq", bits=4, group_size=16, symmetric=False, clip=True, calibration=block)
    add("quantize", "smoothquant", "smoothquant", calibration=block)
    add("quantize", "hqq", "hqq", bits=4, group_size=16, calibration=NONE)
    add("quantize", "hqq-symmetric", "hqq", bits=4, group_size=16, symmetric=True, calibration=NONE)
    add("quantize", "nf4", "nf4", group_size=16, calibration=NONE)
    add("quantize", "nf4-double", "nf4", group_size=16, double_quant=True, calibration=NONE)
    add("quantize", "fp8", "fp8", calibration=NONE)
    add("quantize", "fp8-dynamic", "fp8", strategy="tensor", activations="dynamic", calibration=NONE)
    add("quantize", "mxfp4", "mxfp4", calibration=NONE)
    add("quantize", "nvfp4", "nvfp4", calibration=NONE)
    add("quantize", "wanda-gptq", "gptq", "prune/wanda-linear", bits=4, group_size=16, calibration=TEXT)

    add(
        "teach",
        "taught-answers",
        "answers",
        dataset="arithmetic",
        num_samples=6,
        held_out=4,
        batch_size=2,
        max_new_tokens=6,
        temperature=0.7,
        shots=1,
    )
    add(
        "teach",
        "taught-logits",
        "logits",
        dataset="news",
        num_samples=4,
        held_out=2,
        batch_size=2,
        sequence_length=32,
        top=8,
    )

    tune: dict[str, Any] = {"train": TEXT, "learning_rate": 0.01, "steps": 3, "batch_size": 2}
    lora = {"rank": 2, "alpha": 4}
    small = {"sparsity": 0.5, "scope": "row"}
    pruned = "prune/wanda-linear"
    for keep in ("mask", "none"):
        add("finetune", f"lora-{keep}", "lora", pruned, keep=keep, **lora, **tune)
        add("finetune", f"full-{keep}", "full", pruned, keep=keep, weight_decay=0.1, **tune)
        add(
            "finetune",
            f"qat-{keep}",
            "qat",
            "quantize/wanda-gptq",
            keep=keep,
            **tune | {"learning_rate": 0.1},
        )
        add(
            "finetune",
            f"eco-{keep}",
            "eco",
            "quantize/wanda-gptq",
            keep=keep,
            **tune | {"learning_rate": 0.1},
        )
    add("finetune", "eco-sgd", "eco", "quantize/rtn-w4", optimizer="sgd", **tune | {"learning_rate": 1.0})
    for keep, scope in itertools.product(("small", "shuffled"), ("matrix", "global", "row")):
        add("finetune", f"full-{keep}-{scope}", "full", keep=keep, small=small | {"scope": scope}, **tune)
    add("finetune", "lora-shuffled", "lora", keep="shuffled", small=small, **lora, **tune)
    add("finetune", "lora-requantize", "lora", "quantize/gptq-w4", requantize=True, **lora, **tune)
    add(
        "finetune",
        "full-packed",
        "full",
        **tune
        | {
            "train": {
                "dataset": "arithmetic",
                "num_samples": 6,
                "held_out": 4,
                "sequence_length": 64,
                "packing": True,
            },
            "accumulation": 2,
        },
    )
    add(
        "finetune",
        "lora-answers",
        "lora",
        pruned,
        **lora,
        **tune
        | {
            "train": {
                "dataset": "taught-answers",
                "num_samples": 4,
                "held_out": 2,
                "sequence_length": 64,
            }
        },
    )
    add(
        "finetune",
        "full-distilled",
        "full",
        pruned,
        **tune
        | {
            "train": {
                "dataset": "taught-logits",
                "num_samples": 4,
                "held_out": 2,
                "sequence_length": 32,
            },
            "distillation": {"weight": 0.5, "temperature": 2.0},
        },
    )
    return made


SMALLER = (
    "wanda-linear", "wanda-block", "sparsegpt-linear", "width-l2", "depth-block-influence-block",
    "magnitude-global", "gptq-w4", "awq", "rtn-w4", "smoothquant", "lora-mask", "full-mask",
)  # fmt: skip
"""Recipes tried on the other families too; those that refuse a family are left out."""
LEVELS: dict[str, list[dict[str, Any]]] = {
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


def params(family: str, inputs: Path) -> dict[str, Any]:
    """All of params.yaml for one family."""
    raw = project.params(inputs)
    raw["models"]["tiny"] |= {
        "source": f"path:{inputs / family}",
        "in_features": families.IN_FEATURES[family],
        "sha256": project.sha256(inputs / family),
    }
    made = recipes()
    for kind, levels in LEVELS.items():
        raw["datasets"][kind] = {
            "kind": kind,
            "seed": 0,
            "test": 4,
            "train": 4,
            "fewshot": 1,
            "levels": levels,
        }
    if family != "llama":
        made = {s: {n: r for n, r in found.items() if n in SMALLER} for s, found in made.items()}
        if family == "gpt2":
            made["quantize"].pop("smoothquant")
    else:
        raw["noise"] = {
            "batch": {"source": "base/tiny", "batch_size": 3},
            "fp32": {"source": "base/tiny", "dtype": "float32"},
        }
        raw["floor"] = {"dot": {"source": "base/tiny", "responder": "dot"}}
    for section in ("prune", "quantize", "teach", "finetune"):
        raw[section] = made[section]
    for section in ("noise", "floor"):
        raw[section] = raw[section] if family == "llama" else {}
    raw["suites"] = {
        "perplexity": {
            "news": {
                "windows": 3,
                "sequence_length": 32,
                "batch_size": 2,
                "emergence": {"windows": 64, "sequence_length": 4, "steps": 5, "width": 8},
            }
        },
        "graded": {kind: {"shots": 1, "batch_size": 2} for kind in LEVELS},
        "benchmark": {},
    }
    raw["suites"]["graded"]["brackets"]["thinking"] = {
        "budgets": [0, 4, 8],
        "draws": 3,
        "temperature": 0.9,
        "waits": 1,
    }
    candidates = ["base/tiny"]
    if family == "llama":
        candidates += [
            "noise/batch",
            "noise/fp32",
            "floor/dot",
            "prune/wanda-linear",
            "quantize/gptq-w4",
            "quantize/smoothquant",
            "finetune/lora-mask",
        ]
    raw["evaluate"] = {"candidates": candidates}
    raw["profile"]["candidates"] = []
    return raw


def hashes(root: Path, label: str) -> None:
    """Print `<hash>  <family>/<file>` of every file under `root`; of a table a hash a column."""
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        if not file.is_file() or name.parts[0] in SKIPPED:
            continue
        if file.suffix == ".parquet" and name.parts[0] in ("results", "report"):
            for column, values in pd.read_parquet(file).items():
                text = json.dumps(values.tolist(), default=str)
                print(f"{hashlib.sha256(text.encode()).hexdigest()[:16]}  {label}/{name}:{column}")
        else:
            print(f"{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}  {label}/{name}")


def main() -> None:
    """Make everything and print its hashes."""
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import logging

    logging.disable(logging.WARNING)
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        for name, seed in (("news", 1), ("speeches", 2)):
            (inputs / f"{name}.txt").write_text(project.text(seed))
        for family in families.CONFIGS:
            families.save(family, inputs / family)
        (inputs / "tiny").symlink_to(inputs / "llama")
        for family in families.CONFIGS if len(sys.argv) < 2 else sys.argv[1:]:
            place = Path(folder) / family
            place.mkdir()
            os.chdir(place)
            os.symlink(inputs, "inputs")
            clock = time.perf_counter()
            make(params(family, Path("inputs")))
            print(f"{family}: {time.perf_counter() - clock:.0f} s", file=sys.stderr)
            hashes(Path("data"), family)
            os.chdir(start)


def make(raw: dict[str, Any]) -> None:
    """Run every stage of params in the working folder, one after the other."""
    from stages.download import download
    from stages.evaluate import evaluate
    from stages.finetune import finetune
    from stages.floor import floor
    from stages.job import lineage
    from stages.job.load import validate
    from stages.job.pieces import STAGES
    from stages.noise import noise
    from stages.prune import prune
    from stages.quantize import quantize
    from stages.report import report
    from stages.teach import teach
    from stages.validate import validate as mark

    params = validate(raw)
    mark(*STAGES["validate"].arguments(params, "all"))
    for name in (*(f"datasets/{key}" for key in params.datasets), *(f"base/{key}" for key in params.models)):
        download(*STAGES["download"].arguments(params, name))
    stages: dict[str, Any] = {
        "prune": prune, "quantize": quantize, "teach": teach, "finetune": finetune, "noise": noise,
        "floor": floor,
    }  # fmt: skip
    todo, done = list(params.recipes()), set[str]()
    while todo:
        for artifact in list(todo):
            if done >= lineage.ancestors(params, artifact):
                stage, name = artifact.split("/")
                try:
                    stages[stage](*STAGES[stage].arguments(params, name))
                except Exception as error:
                    print(f"{artifact}: {type(error).__name__}: {error}")
                done.add(artifact)
                todo.remove(artifact)
    for stage, function, names in (("evaluate", evaluate, params.evaluations()), ("report", report, ["all"])):
        for name in names:
            try:
                function(*STAGES[stage].arguments(params, name))
            except Exception as error:
                print(f"{stage} {name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

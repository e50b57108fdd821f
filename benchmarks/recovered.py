"""The table of docs/recovery.md, from what a run of sweeps/recovery.yaml has written.

    cp sweeps/recovery.yaml params.yaml && prunequant run
    python -m benchmarks.recovered

A row is a recipe, with its source's scores before the arrows. Zeros are counted in the files as they are on
disk, position by position: how many weights of block linears are zero in the source and not in the result. Of
a quantized source it is told how many weights lie on another point of its grid.
"""

from pathlib import Path

import pandas as pd
from safetensors import safe_open

from stages.core.run import Run
from stages.job.load import load
from stages.job.params import Params
from stages.model.artifact import load_model, load_record
from stages.model.blocks import linears

MODELS, RESULTS, CURVES = Path("data/models"), Path("data/results"), Path("data/curves")
MEASURES = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("graded", "acc", "{:.3f}"),
    ("graded", "exact_match", "{:.3f}"),
)


def score(candidate: str, suite: str, metric: str) -> float | None:
    """A candidate's score over all items; None where it has none yet."""
    file = RESULTS / candidate / suite / "scores.parquet"
    if not file.exists():
        return None
    rows = pd.read_parquet(file)
    return float(rows[(rows["difficulty"] == "all") & (rows["metric"] == metric)]["value"].iloc[0])


def before_after(source: str, candidate: str, suite: str, metric: str, form: str) -> str:
    """`before → after`, with a dash for what is not there."""
    found = (score(source, suite, metric), score(candidate, suite, metric))
    return " → ".join("–" if value is None else form.format(value) for value in found)


def learned(recipe: str) -> str:
    """The held-out loss at the start of a recipe's curve, and that of the model it has written."""
    before = pd.read_csv(CURVES / f"{recipe}.csv")["heldout_loss"].iloc[0]
    written = load_record(f"finetune/{recipe}")["notes"][f"finetune/{recipe}"]["held_out_loss"]
    return f"{before:.3f} → {written:.3f}"


def lost(source: str, candidate: str) -> str:
    """How many of the zeros of the source's block linears are not zero in the candidate, of how many."""
    gone = zeros = 0
    files = [MODELS / name / "model.safetensors" for name in (source, candidate)]
    with safe_open(files[0], "pt") as old, safe_open(files[1], "pt") as new:
        for name in old.keys():  # noqa: SIM118 (the file is no dict)
            if ".layers." in name and len(old.get_slice(name).get_shape()) == 2:
                was = old.get_tensor(name) == 0
                zeros += int(was.sum())
                gone += int((was & (new.get_tensor(name) != 0)).sum())
    return f"{gone:,} of {zeros:,}"


def moved(source: str, candidate: str) -> str:
    """The share of the weights of the source's block linears that are another number in the candidate."""
    run = Run(device="cpu", dtype="bfloat16", threads=1, seed=0)
    before, after = (load_model(name, run, dequantize=True) for name in (source, candidate))
    changed = total = 0
    for one in linears(before):
        changed += int((one.weight != after.get_submodule(one.name).weight).sum())
        total += one.weight.numel()
    return f"{changed / total:.2%} of {total:,}"


def table(params: Params) -> list[str]:
    """Its lines, for every recipe that has been run."""
    suites = {kind: next(iter(getattr(params.suites, kind))) for kind in ("perplexity", "graded")}
    heads = ["recipe", "held-out loss", *(f"{suites[kind]}, {metric}" for kind, metric, _ in MEASURES)]
    lines = [f"| {' | '.join([*heads, 'zeros lost, codes moved'])} |", "|---" * (len(heads) + 1) + "|"]
    for name, recipe in params.finetune.items():
        candidate = f"finetune/{name}"
        if not (MODELS / candidate).exists():
            continue
        scores = [
            before_after(recipe.source, candidate, suites[kind], metric, form)
            for kind, metric, form in MEASURES
        ]
        kept = {"prune": lost, "quantize": moved}.get(recipe.source.split("/")[0], lambda *_: "–")
        cells = [f"`{name}`", learned(name), *scores, kept(recipe.source, candidate)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(load(Path("params.yaml")))))  # noqa: T201

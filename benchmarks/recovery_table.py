"""Print the table of docs/recovery.md from the artifacts of sweeps/recovery.yaml.

    cp sweeps/recovery.yaml params.yaml && prunequant run
    python -m benchmarks.recovery_table

A row is a recipe, with its source's scores before the arrows. Zeros are compared position by position in the
files on disk: how many weights of block linears are zero in the source and not in the result. For a quantized
source the last column is the share of weights that moved to another point of its grid.
"""

from pathlib import Path

import pandas as pd
from safetensors import safe_open

from benchmarks.figures import show
from stages.core.files import CURVES, MODELS, RESULTS
from stages.core.run import Run
from stages.core.tables import SCORES
from stages.job.load import load
from stages.job.params import Params
from stages.model.artifact import load_model, load_record
from stages.model.blocks import linears

MEASURES = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("graded", "acc", "{:.3f}"),
    ("graded", "exact_match", "{:.3f}"),
)


def score(candidate: str, suite: str, metric: str) -> float | None:
    """Return a candidate's score over all items; None if there is none yet."""
    file = RESULTS / candidate / suite / SCORES
    if not file.exists():
        return None
    rows = pd.read_parquet(file)
    return float(rows[(rows["difficulty"] == "all") & (rows["metric"] == metric)]["value"].iloc[0])


def before_after(source: str, candidate: str, suite: str, metric: str, form: str) -> str:
    """Return `before → after`, with a dash for a missing score."""
    values = (score(source, suite, metric), score(candidate, suite, metric))
    return " → ".join("–" if value is None else form.format(value) for value in values)


def learned(recipe: str) -> str:
    """Return the held-out loss at the start of a recipe's curve, and that of the written model."""
    before = pd.read_csv(CURVES / f"{recipe}.csv")["heldout_loss"].iloc[0]
    written = load_record(f"finetune/{recipe}")["notes"][f"finetune/{recipe}"]["held_out_loss"]
    return f"{before:.3f} → {written:.3f}"


def lost(source: str, candidate: str) -> str:
    """Return how many zeros of the source's block linears are not zero in the candidate, and of how many."""
    gone = zeros = 0
    files = [MODELS / name / "model.safetensors" for name in (source, candidate)]
    with safe_open(files[0], "pt") as old, safe_open(files[1], "pt") as new:
        for name in old.keys():  # noqa: SIM118 (the file is no dict)
            if ".layers." in name and len(old.get_slice(name).get_shape()) == 2:
                before = old.get_tensor(name) == 0
                zeros += int(before.sum())
                gone += int((before & (new.get_tensor(name) != 0)).sum())
    return f"{gone:,} of {zeros:,}"


def moved(source: str, candidate: str) -> str:
    """Return the share of weights of the source's block linears that differ in the candidate."""
    run = Run(device="cpu", dtype="bfloat16", threads=1, seed=0, numerics="fast")
    before, after = (load_model(name, run, dequantize=True) for name in (source, candidate))
    changed = total = 0
    for linear in linears(before):
        changed += int((linear.weight != after.get_submodule(linear.name).weight).sum())
        total += linear.weight.numel()
    return f"{changed / total:.2%} of {total:,}"


def table(params: Params) -> list[str]:
    """Return the table's lines, for every recipe that has run."""
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
    for line in table(load(Path("params.yaml"))):
        show(line)

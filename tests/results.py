"""Made-up results of the default sweep, in the form in which evaluations write them: a report's input."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stages.core import tables
from stages.core.files import RECORD
from stages.core.tables import Sample, Score, Setting, Subject
from stages.job.load import checked_params
from stages.job.params import Params
from stages.reporting.collect import Results, collect
from stages.reporting.comparison import Comparison, compare_candidates
from stages.reporting.hypotheses.readout import TIMES
from stages.reporting.judging import Report

ROOT = Path(__file__).parents[1]
# By how much a recipe is worse than the dense base, in nats a token; and its size in MB, on disk and ideally.
HARM = {
    "smollm2": (0.0, 269.1, 269.0), "smollm2-batch-5": (0.0, 269.1, 269.0),
    "magnitude-50": (1.9, 269.1, 176.3), "wanda-50": (0.35, 269.1, 176.3),
    "rtn-w8g64": (0.001, 168.9, 166.1), "rtn-w4g64": (0.12, 115.7, 112.9), "rtn-w3g64": (1.1, 102.5, 99.8),
    "gptq-w4g64": (0.06, 115.7, 112.9), "gptq-w3g64": (0.4, 102.5, 99.8),
    "wanda-50-gptq-w4g64": (0.5, 115.7, 99.6), "wanda-50-lora": (0.22, 269.1, 176.3),
}  # fmt: skip
LEVEL = 0.15  # how much harder each level of arithmetic is than the one before


def params(**changes: Any) -> Params:
    """Return the project's own params with two models measured, and whole sections changed."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["profile"]["candidates"] = ["base/smollm2", "quantize/gptq-w4g64"]
    return checked_params(raw | changes)


def without(suites: dict[str, Any], *kinds: str) -> dict[str, Any]:
    """Return the sections of suites with some kinds empty."""
    return {kind: {} if kind in kinds else section for kind, section in suites.items()}


def write(root: Path, wanted: Params, *, response: str = "7") -> None:
    """Write scores and samples of every evaluation that `wanted` names into `root`.

    Args:
        response: the answer that every candidate but the base generates where it is wrong.
    """
    for candidate in wanted.evaluate.candidates:
        for suite in wanted.suites.by_name():
            about = record(wanted, candidate)
            setting = Setting(
                suite=suite, dataset_source=getattr(wanted.datasets[suite], "source", "reasoning-gym"),
                backend="transformers", batch_size=5 if candidate.startswith("noise/") else 8,
                dtype="bfloat16", device="cpu", threads=1,
            )  # fmt: skip
            answered = _text if suite in wanted.suites.perplexity else _items
            scores, samples = answered(candidate, suite, wanted, response)
            folder = root / candidate / suite
            folder.mkdir(parents=True)
            tables.write_tables(
                folder,
                tables.score_table(tables.subject(about), setting, scores),
                tables.sample_table(candidate, suite, samples),
            )
            (folder / RECORD).write_text(json.dumps(about))
            if candidate.startswith("base/"):
                tables.item_table(suite, samples).to_parquet(folder / tables.ITEMS, index=False)
    for candidate in wanted.profile.candidates:
        _measure(root.parent / "profile" / candidate, candidate, wanted)


def _measure(folder: Path, candidate: str, wanted: Params) -> None:
    """Write a profile in which a batch takes as many hundredths of a second a token as it has rows."""
    settings = wanted.profile.model_dump(mode="json", exclude={"candidates", "batch_sizes"})
    quartiles = {
        batch: {"median": batch / 100, "low": batch / 101, "high": batch / 99}
        for batch in wanted.profile.batch_sizes
    }
    repeats = [
        {"candidate": candidate, "batch_size": batch, "repeat": i} | dict.fromkeys(TIMES, batch / (100 + i))
        for batch in wanted.profile.batch_sizes
        for i in range(wanted.profile.repeats)
    ]
    facts = {
        "candidate": candidate, **settings, "device": "cpu", "dtype": "bfloat16", "torch": "2",
        "processor": "made up",
        "batches": [
            {
                "batch_size": batch, **dict.fromkeys(TIMES, middle), "tokens_per_second": 100.0,
                "peak_bytes": 10**9, "joules_per_token": None, "energy": "not measured", "others_busy": 0.0,
            }
            for batch, middle in quartiles.items()
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps(facts))
    pd.DataFrame(repeats).to_parquet(folder / "repeats.parquet", index=False)


def record(wanted: Params, candidate: str) -> dict[str, Any]:
    """Return an `artifact.json` as the stages would write it."""
    recipes = wanted.recipes()
    lineage = [candidate]
    while lineage[0] in recipes:
        lineage.insert(0, recipes[lineage[0]].source)
    name = candidate.split("/")[1]
    _, disk, ideal = HARM[name]
    model = lineage[0].removeprefix("base/")
    return {
        "artifact": candidate,
        "lineage": lineage,
        "recipes": {
            step: recipes[step].model_dump(mode="json")
            for step in lineage[1:]
            if not step.startswith("noise/")
        },
        "base": {
            "name": model,
            "source": wanted.models[model].source,
            "grid": {"format": "Q4_1", "group_size": 32},
        },
        "texts": {name: dataset.source for name, dataset in wanted.datasets.items() if name != "arithmetic"},
        "sparsity": 0.5 if "50" in name else 0.0015,
        "sparsity_by_block": [0.4, 0.6] if "50" in name else [0.0, 0.0001],
        "notes": {step: _note(step) for step in lineage[1:]},
        "layout": "pack-quantized" if candidate.startswith("quantize/") else "dense",
        "num_parameters": 134_515_008,
        "bits_per_weight": ideal * 8e6 / 134_515_008,
        "bytes_ideal": int(ideal * 1e6),
        "bytes_on_disk": int(disk * 1e6),
    }


def _note(artifact: str) -> dict[str, Any]:
    """Return what a step notes: a recovery its curve, one that reads text its errors by block."""
    if artifact.startswith("finetune/"):
        return {"curve": {"tokens": [0, 1000, 2000], "held_out_loss": [3.5, 3.25, 3.125]}}
    reads = any(method in artifact for method in ("wanda", "gptq"))
    return {"block_errors": {"tokens": 512, "errors": [0.125, 0.25]}} if reads else {}


def read(wanted: Params, root: Path) -> Results:
    """Read the results that `wanted` names from `root`."""
    return collect(
        wanted.evaluations(), list(wanted.evaluate.candidates), list(wanted.suites.by_name()), root
    )


def _text(candidate: str, suite: str, wanted: Params, response: str) -> tuple[list[Score], list[Sample]]:
    count = wanted.suites.perplexity[suite].windows
    easy, own = random.Random(suite), random.Random(candidate + suite)
    harm = HARM[candidate.split("/")[1]][0] * (1.0 if suite == "news" else 1.3)
    losses = [easy.gauss(3.0, 0.25) + harm + own.gauss(0, 0.01 + 0.05 * harm) for _ in range(count)]
    mean = math.fsum(losses) / count
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (count - 1) / count)
    task = f"perplexity-{suite}"
    score = Score(
        task=task, readout="likelihood", metric="perplexity", value=math.exp(mean),
        stderr=math.exp(mean) * spread, num_items=count, higher_is_better=False, shots=0, seed=0,
        task_version="windows of 512", prompt_hash=_hash(suite),
    )  # fmt: skip
    samples = [
        Sample(
            task=task, readout="likelihood", doc_id=i, prompt_hash=_hash(suite, i), metric="nats_per_token",
            score=loss, log_likelihoods=[-loss * 511],
        )
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    return [score], samples


def _items(candidate: str, suite: str, wanted: Params, response: str) -> tuple[list[Score], list[Sample]]:
    benchmark = suite in wanted.suites.benchmark
    levels = ["all"] if benchmark else [level.name for level in wanted.datasets[suite].levels]
    each = 40 if benchmark else wanted.datasets[suite].test
    readouts = [("likelihood", "acc")] + ([] if benchmark else [("generation", "exact_match")])
    harm = HARM[candidate.split("/")[1]][0]
    scores: list[Score] = []
    samples: list[Sample] = []
    for readout, metric in readouts:
        hard, own = random.Random(suite + readout), random.Random(candidate + suite + readout)
        right = {}
        for rank, level in enumerate(levels):
            bar = 0.95 - rank * LEVEL - 0.35 * min(harm, 1.5)
            for i in range(each):
                shift = own.gauss(0, 0.02 + 0.1 * harm) if candidate != "base/smollm2" else 0.0
                right[level, rank * each + i] = float(hard.random() + shift < max(bar, 0.25))
        for level in dict.fromkeys(["all", *levels]):
            picked = [value for (at, _), value in right.items() if level in ("all", at)]
            mean = sum(picked) / len(picked)
            scores.append(
                Score(
                    task=suite, readout=readout, difficulty=level, metric=metric, value=mean,
                    stderr=math.sqrt(mean * (1 - mean) / (len(picked) - 1)), num_items=len(picked),
                    floor=0.25 if readout == "likelihood" else None, higher_is_better=True, shots=4, seed=0,
                    task_version="1", prompt_hash=_hash(suite, level),
                )
            )  # fmt: skip
        samples += [
            Sample(
                task=suite, readout=readout, difficulty=level, metric=metric, score=value, doc_id=i,
                prompt_hash=_hash(suite, i), target=str(i), response=str(i) if value else response,
                generated_tokens=3, prompt=f"question {i} of {level}",
            )
            for (level, i), value in right.items()
        ]  # fmt: skip
    return scores, samples


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def subject(candidate: str) -> Subject:
    """Return a candidate of the base `m`, made from it directly."""
    dense = candidate == "base/m"
    return Subject(
        candidate=candidate, base="m", base_source="path:m", source=None if dense else "base/m",
        lineage=["base/m"] if dense else ["base/m", candidate], sparsity=0.0, structure="dense",
        reads=[], calibration="none", layout="dense", num_parameters=1, bits_per_weight=16.0, bytes_ideal=2,
        bytes_on_disk=2,
    )  # fmt: skip


def of_items(items: dict[str, Sequence[float]], **measure: Any) -> Results:
    """Return results of the suite `s` from the per-item scores of each candidate of the base `m`.

    Args:
        measure: values of the columns of `stages.core.tables.MEASURE`; the default is `acc` by likelihood.
            The items of a perplexity are its windows, in nats a token.
    """
    setting = Setting(
        suite="s", dataset_source="path:s", backend="transformers", batch_size=1, dtype="float32",
        device="cpu", threads=1,
    )  # fmt: skip
    named = {"task": "t", "readout": "likelihood", "metric": "acc"} | measure
    nats = named["metric"] == "perplexity"
    scores, samples = [], []
    for candidate, values in items.items():
        mean = math.fsum(values) / len(values)
        score = Score(
            **named, value=math.exp(mean) if nats else mean, num_items=len(values), higher_is_better=not nats,
            task_version="1", shots=0, seed=0,
        )  # fmt: skip
        scores.append(tables.score_table(subject(candidate), setting, [score]))
        answered = named | ({"metric": "nats_per_token"} if nats else {})
        rows = [
            Sample(
                **answered, doc_id=i, prompt_hash=str(i), target="1.0", score=value,
                response=None if nats else str(value),
            )
            for i, value in enumerate(values)
        ]  # fmt: skip
        samples.append(tables.sample_table(candidate, "s", rows))
    rows = pd.concat(scores, ignore_index=True).assign(**{tables.PARAMETERS_REMOVED: 0.0})
    return Results(rows, pd.concat(samples, ignore_index=True))


def together(*parts: Results) -> Results:
    """Return the rows of several results, as of one suite with several measures."""
    return Results(
        pd.concat([part.scores for part in parts], ignore_index=True),
        pd.concat([part.samples for part in parts], ignore_index=True),
    )


def compared(results: Results, **settings: Any) -> Comparison:
    """Compare candidates as a plain report does, with a margin of two points."""
    return compare_candidates(results, Report(**{"margin": 0.02} | settings))

"""A small project in several variants, each computed once by an undisturbed `dvc repro`.

A drill copies the project of a variant, edits it into another, disturbs the runs that follow, and compares
what they end with to the other variant's project. The stages are the real ones on a tiny model; `Size` says
how much work they have.
"""

import copy
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flows.graph import Stage
from stages.core.files import read_json, sha256, text_sha256
from stages.job.locked import LOCK, Entries, whole
from tests import families, finished, project


@dataclass(frozen=True)
class Size:
    """How much work the stages have."""

    blocks: int
    hidden: int
    samples: int
    """Windows that methods are calibrated on."""
    steps: int
    """Steps of training."""
    windows: int
    """Windows that perplexity is computed on."""
    items: int
    """Items of the graded suite; 0 leaves it out."""


SIZES = {
    "short": Size(blocks=2, hidden=32, samples=4, steps=2, windows=3, items=0),
    "long": Size(blocks=12, hidden=128, samples=96, steps=160, windows=400, items=60),
}
"""Stages of two to three seconds, nearly all of it to start; and of four seconds to a minute."""

METHOD = Path("stages/pruning/wanda.py")
_SCORES = "wanda_scores(weight, statistic.norm())"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "sparsity": {"prune.wanda-50.sparsity": 0.25},
    "rate": {"finetune.wanda-50-lora.learning_rate": 0.002},
    "bits": {"quantize.gptq-w4g32.bits": 3},
    "batch": {"suites.perplexity.news.batch_size": 3},
    "fewer": {"evaluate.candidates": ["base/tiny", "finetune/wanda-50-lora"]},
    "code": {str(METHOD): "wanda_scores(weight, statistic.norm() ** 0.5)"},
}
"""What each variant changes: settings of params.yaml, or the score that the method computes."""
UNCOMPARED = {".dvc", ".git", "__pycache__", "flows", "stages", "runs", "removed", str(LOCK)}
"""What varies from run to run or is compared otherwise; not `data/scratch`, which must end empty."""


def settings(inputs: Path, size: Size) -> dict[str, Any]:
    """Return the params of variant `base`."""
    values = finished.params(inputs)
    del values["prune"]["magnitude-50"], values["noise"]["tiny-batch-3"]
    text = {"dataset": "news", "num_samples": size.samples, "sequence_length": 32}
    values["prune"]["wanda-50"]["calibration"] = text
    values["quantize"]["gptq-w4g32"]["calibration"] = text
    values["finetune"]["wanda-50-lora"] |= {
        "train": text | {"held_out": max(1, size.samples // 8)}, "steps": size.steps, "batch_size": 4,
        "checkpoint_every": max(1, size.steps // 16),
    }  # fmt: skip
    values["models"]["tiny"]["in_features"] = [size.hidden, 2 * size.hidden]
    if size.items:
        values["datasets"]["arithmetic"]["test"] = size.items
        values["datasets"]["arithmetic"]["levels"][0]["digits"] = 2
    else:
        del values["datasets"]["arithmetic"]
        values["suites"]["graded"] = {}
    values["suites"]["perplexity"]["news"]["windows"] = size.windows
    values["evaluate"]["candidates"] = ["base/tiny", "quantize/gptq-w4g32", "finetune/wanda-50-lora"]
    return values


def write_inputs(folder: Path, size: Size) -> None:
    """Write the tiny model and the text."""
    folder.mkdir(parents=True)
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.num_hidden_layers, config.hidden_size = size.blocks, size.hidden
    config.intermediate_size, config.head_dim = 2 * size.hidden, size.hidden // 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "tiny")
    families.tokenizer().save_pretrained(folder / "tiny")
    documents = 60 + size.samples + size.windows
    for name, seed in (("news", 1), ("speeches", 2)):
        (folder / f"{name}.txt").write_text(project.text(seed, documents))


class Variants:
    """The variants in a folder, made when they are first needed."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self.inputs = folder / "inputs"
        self.code = (project.ROOT / METHOD).read_text()
        if _SCORES not in self.code:
            raise SystemExit(f"{METHOD} does not compute {_SCORES}; name its score in {__name__}.")
        if not (self.inputs / "news.txt").exists():
            shutil.rmtree(self.inputs, ignore_errors=True)
            write_inputs(self.inputs, size)
        self.base = settings(self.inputs, size)
        self.env = {
            "PREFECT_HOME": str(folder / "prefect"), "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "TQDM_DISABLE": "1",
        }  # fmt: skip

    def apply(self, variant: str, at: Path) -> None:
        """Edit the project `at` into a variant, as a user would in an editor."""
        values, code = copy.deepcopy(self.base), self.code
        for key, value in VARIANTS[variant].items():
            if key == str(METHOD):
                code = code.replace(_SCORES, value)
                continue
            *parents, last = key.split(".")
            section = values
            for parent in parents:
                section = section[parent]
            section[last] = value
        if project.read(at) != values:
            project.write(at, values)
        if (at / METHOD).read_text() != code:
            (at / METHOD).write_text(code)

    def reference(self, variant: str) -> Path:
        """Return the variant's project as an undisturbed `dvc repro` leaves it."""
        at = self.folder / "reference" / variant
        if at.exists():
            return at
        partial = at.with_name(f".{variant}")
        shutil.rmtree(partial, ignore_errors=True)
        if variant == "base":
            project.make(partial, self.inputs)
            project.write(partial, self.base)
            project.commit(partial, "a small sweep")
        else:
            finished.copy(self.reference("base"), partial)
            self.apply(variant, partial)
        project.run(partial, sys.executable, "-m", "dvc", "repro")
        shutil.rmtree(partial / ".dvc/tmp")
        partial.replace(at)
        return at


def entries(at: Path) -> Entries:
    """Return what the project's dvc.lock holds, or its copy if it is cut off."""
    for file in (at / LOCK, at / ".dvc/tmp/dvc.lock.good"):
        if file.exists() and (stages := whole(file.read_text())) is not None:
            return stages
    return {}


def gone(at: Path, stages: Entries) -> dict[str, list[str]]:
    """Return the stages that params.yaml no longer names, whose results are moved away, with what they wrote.

    dvc.lock keeps an entry of such a stage, of whichever variant had it last.
    """
    outs = {name: [out["path"] for out in entry["outs"]] for name, entry in stages.items()}
    return {name: paths for name, paths in outs.items() if not all((at / path).exists() for path in paths)}


def same(name: str, entry: Any, other: Any) -> bool:
    """Tell whether two lock entries of a stage agree; an edit of a comment changes what `code` reads."""
    return bool(entry["outs"] == other["outs"] if name == "code" else entry == other)


def objects(at: Path, entry: Any) -> set[str]:
    """Return which results of a stage the project's cache holds, by hash, those in folders included.

    On a full disk a bare `dvc repro` locks a stage though its results did not reach the cache.
    """
    cache, held = at / ".dvc/cache/files/md5", set()
    hashes = [out["md5"] for out in entry["outs"]]
    for md5 in hashes:
        file = cache / md5[:2] / md5[2:]
        if file.exists():
            held.add(md5)
            if md5.endswith(".dir"):
                hashes += [inner["md5"] for inner in read_json(file)]
    return held


def record(at: Path, name: str, entry: Mapping[str, Any]) -> Path:
    """Return the run record of a stage."""
    return at / Stage(name, entry["cmd"], (), tuple(out["path"] for out in entry["outs"])).record


def seconds(at: Path, stages: Entries) -> float:
    """Return how long the stages' commands took, by their run records."""
    return sum(read_json(record(at, name, entry))["seconds"] for name, entry in stages.items())


def contents(at: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder that does not vary from run to run."""
    files = (file.relative_to(at) for file in at.rglob("*") if file.is_file())
    return {str(file): sha256(at / file) for file in files if not UNCOMPARED & set(file.parts)}


def size_of(at: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in at.rglob("*") if file.is_file())


def origin(size: Size) -> str:
    """Hash what the references are computed from, beside the variants: the stages and the size."""
    return text_sha256(f"{size}{contents(project.ROOT / 'stages')}")

"""Recipes run through the real stage functions in the working folder, over the shared tiny inputs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from stages import download as _download
from stages import evaluate as _evaluate
from stages import finetune as _finetune
from stages import floor as _floor
from stages import noise as _noise
from stages import profile as _profile
from stages import prune as _prune
from stages import quantize as _quantize
from stages import report as _report
from stages import teach as _teach
from stages import validate as _validate
from stages.job import pieces
from stages.job.load import checked_params as checked
from stages.job.params import Params
from tests import families, project


def _stage(module: ModuleType) -> Callable[[Params, str], None]:
    """The stage function of a stage's file, called as the command line calls it."""
    name = module.__name__.rpartition(".")[2]

    def call(params: Params, recipe: str = "all") -> None:
        getattr(module, name)(*pieces.STAGES[name].arguments(params, recipe))

    return call


download, evaluate, profile, report, validate = map(
    _stage, (_download, _evaluate, _profile, _report, _validate)
)
prune, quantize, teach = map(_stage, (_prune, _quantize, _teach))
finetune, noise, floor = map(_stage, (_finetune, _noise, _floor))
STAGES = {
    "prune": prune, "quantize": quantize, "teach": teach, "finetune": finetune, "noise": noise,
    "floor": floor,
}  # fmt: skip
TEXT = {"dataset": "news", "num_samples": 4, "sequence_length": 32}
NONE = {"dataset": "none"}


def params(
    family: str, recipes: dict[str, dict[str, Any]], datasets: dict[str, dict[str, Any]] | None = None
) -> Params:
    """Params over the shared inputs with one base, `base/tiny` of `family`, the given recipes and data."""
    raw = project.params(Path("inputs"))
    raw["datasets"] |= datasets or {}
    raw["models"]["tiny"] |= {
        "source": f"path:inputs/{family}", "in_features": families.IN_FEATURES[family],
        "sha256": project.sha256(Path("inputs") / family),
    }  # fmt: skip
    raw |= {"prune": {}, "quantize": {}, "teach": {}, "finetune": {}, "noise": {}, "floor": {}}
    raw["evaluate"] = {"candidates": ["base/tiny"]}
    for artifact, recipe in recipes.items():
        section, name = artifact.split("/")
        raw[section][name] = recipe
    return checked(raw)


def do(chosen: Params, artifacts: list[str] | None = None) -> None:
    """Download the base and the text, and make `artifacts` (all recipes when None) in the order given."""
    for name in ("datasets/news", "base/tiny"):
        download(chosen, name)
    for artifact in list(chosen.recipes()) if artifacts is None else artifacts:
        section, name = artifact.split("/")
        STAGES[section](chosen, name)


def altered(path: Path) -> None:
    """Change a byte of a safetensors or parquet file that stays readable, of the same size and time."""
    content, before = path.read_bytes(), path.stat()
    at = len(content) - 1 if path.suffix == ".safetensors" else content.rindex(b"parquet-cpp")
    path.unlink()  # it may be a link to a file that others read
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def load(artifact: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(Path("data/models") / artifact).eval()


def record(artifact: str) -> dict[str, Any]:
    return json.loads((Path("data/models") / artifact / "artifact.json").read_text())


def dense(model: torch.nn.Module) -> torch.nn.Module:
    """The model after a forward, which is when packed weights are unpacked."""
    with torch.no_grad():
        logits = model(input_ids=torch.arange(16)[None]).logits
    assert logits.isfinite().all()
    return model

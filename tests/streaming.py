"""Recipes that stream `base/tiny` block by block into `made`, kills in the middle, and damaged sources."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.compress.method import WeightMethod
from stages.pruning import sparsegpt
from stages.quantization import gptq
from tests.pipeline import TEXT, do, params
from tests.recipes import GPTQ, MAGNITUDE, RTN, SPARSEGPT, WANDA

PRUNE = {"magnitude": MAGNITUDE, "wanda": WANDA, "sparsegpt": SPARSEGPT}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("prune", MAGNITUDE),
    "wanda": ("prune", WANDA),
    "wanda-none": ("prune", WANDA | {"calibration": TEXT | {"sequential": "none"}}),
    "wanda-block": ("prune", WANDA | {"calibration": TEXT | {"sequential": "block", "batch_size": 2}}),
    "owl": ("prune", SPARSEGPT | {"allocation": {"kind": "owl", "multiple": 2.0}}),
    "joint": ("prune", SPARSEGPT | {"grid": {"bits": 4, "group_size": 32}}),
    "rtn": ("quantize", RTN),
    "gptq": ("quantize", GPTQ),
}
"""(section, settings) of every kind of streamed artifact."""


class Killed(BaseException):
    """A signal."""


def execute(recipe: dict[str, Any], section: str = "prune", family: str = "llama") -> Path:
    """Execute a recipe on `base/tiny`, downloaded if missing, and return the artifact's folder."""
    if not Path("data/models/base/tiny").exists():
        do(params(family, {}))
    chosen = params(family, {f"{section}/made": {"source": "base/tiny", **recipe}})
    chosen.run.start()
    getattr(chosen, section)["made"].execute(f"{section}/made", chosen.run)
    return Path("data/models") / section / "made"


def files(folder: Path) -> dict[str, bytes]:
    """The contents of a folder's files by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def leftovers() -> list[Path]:
    """Files of unfinished work."""
    return [file for file in Path("data/scratch").rglob("*") if file.is_file()]


def counted(monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> list[str]:
    """Return a list that the names of compressed linears are added to; kill the run at number `kill_at`."""
    names: list[str] = []

    def watch(original: Callable[..., Any]) -> Callable[..., Any]:
        def replace_group(self: WeightMethod, linears: Any, statistic: Any, plan: Any) -> Iterator[Any]:
            weights = original(self, linears, statistic, plan)
            for linear in linears:
                if len(names) == kill_at:
                    raise Killed
                names.append(linear.name)
                yield next(weights)

        return replace_group

    for cls in (WeightMethod, sparsegpt.SparseGPT, gptq.GPTQ):
        monkeypatch.setattr(cls, "replace_group", watch(cls.replace_group))
    return names


def killed_after_a_block(monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]) -> None:
    """Execute a recipe that is killed at the second linear of the second block."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counted(patch, kill_at=8)
        execute(recipe)
    assert len(leftovers()) == 2


def rewritten(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file, which may be a link to a shared one."""
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def spoil(folder: Path, how: str) -> None:
    """Damage a checkpoint."""
    file = folder / "model.safetensors"
    if how == "config":
        (folder / "config.json").unlink()
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif how == "empty tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "cut":
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-100])
    elif how == "missing":
        rewritten(file, lambda tensors: tensors.pop(UP))
    else:
        rewritten(file, lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}))


SPOILED = {
    "missing": rf"base/tiny lacks {UP}, which its config asks for\. Download the checkpoint again",
    "shape": rf"base/tiny: {UP} is \[63, 32\], but its config asks for \[64, 32\]\. Download",
    "cut": r"base/tiny cannot be loaded \(SafetensorError: ",
    "config": r"the config of base/tiny cannot be loaded \(",
    "tokenizer": r"the tokenizer of base/tiny cannot be loaded \(",
    "empty tokenizer": r"the tokenizer of base/tiny cannot be loaded \(",
}
"""Kinds of damage, and how each is refused."""

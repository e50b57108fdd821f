"""Compare two checkpoints tensor by tensor, with a single pair of tensors in memory at a time.

Packed weights are compared as the weights that they stand for, so a quantized model can be compared with its
dense source. How far a tensor moved is the norm of the change over the norm of the tensor before.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from stages.core.lazy import torch
from stages.core.reading import reading
from stages.model.packed import FORMATS, weight_from

if TYPE_CHECKING:
    from torch import Tensor

_LISTED = 5
"""Tensors listed, those that moved furthest."""
_BLOCK = re.compile(r"(.*?\.\d+)\.")
OUTSIDE = "outside blocks"
"""The name under which tensors outside blocks are summed up: embeddings, the last norm, the head."""


def compare_tensors(old: Mapping[str, Path], new: Mapping[str, Path]) -> dict[str, Any]:
    """Compare the weights of two checkpoints.

    Args:
        old: the files of a checkpoint by name, config.json among them.
        new: likewise.

    Returns:
        `tensors`, in both; `changed`; `only_old`, `only_new` and `reshaped`, by name; `change`, the norm of
        all differences over that of the old tensors; `zeros_gained` and `zeros_lost`; `blocks`, with the
        same three for each block; and `largest`, the tensors that moved furthest, with also `share`, that of
        changed values, and `max_abs_difference`. What cannot be computed is None: a change from a tensor of
        zeros, or differences between integers, which are compared as stored.
    """
    with _weights(old) as before, _weights(new) as after:
        both = sorted(before.keys() & after.keys())
        reshaped: list[str] = []
        rows: list[dict[str, Any]] = []
        for name in both:
            was, now = before.read(name), after.read(name)
            if was.shape != now.shape or was.is_floating_point() != now.is_floating_point():
                reshaped.append(name)
            else:
                rows.append({"name": name, **_difference(was, now)})
        blocks: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            block = _BLOCK.match(row["name"])
            blocks.setdefault(block[1] if block else OUTSIDE, []).append(row)
        changed = [row for row in rows if row["share"]]
        furthest = sorted(changed, key=lambda row: (-(row["change"] or 0), -row["share"], row["name"]))
        listed = ("name", "share", "change", "zeros_gained", "zeros_lost", "max_abs_difference")
        return {
            "tensors": len(both),
            "changed": len(changed) + len(reshaped),
            "only_old": sorted(before.keys() - after.keys()),
            "only_new": sorted(after.keys() - before.keys()),
            "reshaped": reshaped,
            **_total(rows),
            "blocks": [
                {"block": name, **_total(group)} for name, group in sorted(blocks.items(), key=_in_order)
            ],
            "largest": [{key: row[key] for key in listed} for row in furthest[:_LISTED]],
        }


def _difference(was: "Tensor", now: "Tensor") -> dict[str, Any]:
    """Compare two tensors of one shape; `moved` and `norm` are norms."""
    numbers = was.is_floating_point()
    if numbers:
        was, now = was.float(), now.float()
    count = int((was != now).sum())
    row: dict[str, Any] = {"share": count / max(was.numel(), 1), "change": None, "max_abs_difference": None}
    row |= {"moved": 0.0, "norm": 0.0, "zeros_gained": 0, "zeros_lost": 0}
    if not numbers:
        return row
    row["norm"] = float(torch.linalg.vector_norm(was, dtype=torch.float64))
    if count:
        difference = now - was
        row["moved"] = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        row["max_abs_difference"] = float(difference.abs().max())
        row["zeros_gained"] = int(((now == 0) & (was != 0)).sum())
        row["zeros_lost"] = int(((now != 0) & (was == 0)).sum())
    row["change"] = _ratio(row["moved"], row["norm"])
    return row


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    moved, norm = (sum(row[key] ** 2 for row in rows) ** 0.5 for key in ("moved", "norm"))
    zeros = {key: sum(row[key] for row in rows) for key in ("zeros_gained", "zeros_lost")}
    return {"change": _ratio(moved, norm), **zeros}


def _ratio(moved: float, norm: float) -> float | None:
    return moved / norm if norm else (None if moved else 0.0)


def _in_order(block: tuple[str, Any]) -> tuple[bool, str, int]:
    """Sort blocks by their number, and what lies outside them last."""
    head, _, number = block[0].rpartition(".")
    return (block[0] == OUTSIDE, head, int(number) if number.isdigit() else 0)


class _Weights:
    """The weights of a checkpoint by name, read one at a time."""

    def __init__(self, files: Mapping[str, Path], stack: ExitStack) -> None:
        self._where: dict[str, Any] = {}
        for name, file in files.items():
            if name.endswith(".safetensors"):
                with reading(name):
                    handle = stack.enter_context(safe_open(file, "pt"))
                self._where |= dict.fromkeys(handle.keys(), handle)
        stored = _config(files).get("quantization_config") or {}
        self._scheme = None
        if stored.get("format") in FORMATS:
            self._scheme = {**stored["config_groups"]["group_0"], "format": stored["format"]}
        self._parts: dict[str, list[str]] = {}
        for key in self._where:
            self._parts.setdefault(self._whole(key), []).append(key)

    def _whole(self, key: str) -> str:
        """Return the name of the weight that a stored tensor is, or is a part of."""
        head, _, leaf = key.rpartition(".")
        weight = f"{head}.{leaf.partition('_')[0]}"
        return weight if self._scheme and f"{weight}_scale" in self._where else key

    def keys(self) -> set[str]:
        return set(self._parts)

    def read(self, name: str) -> "Tensor":
        with reading(name):
            return weight_from(
                {key: self._where[key].get_tensor(key) for key in self._parts[name]}, name, self._scheme
            )


@contextmanager
def _weights(files: Mapping[str, Path]) -> Iterator[_Weights]:
    with ExitStack() as stack:
        yield _Weights(files, stack)


def _config(files: Mapping[str, Path]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(files["config.json"].read_text()) if "config.json" in files else {}
    return config

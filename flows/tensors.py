"""Compare two checkpoints tensor by tensor, with a single pair of tensors in memory at a time."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open

_LISTED = 5
"""Tensors listed, those with the largest share of changed values."""


def compare_tensors(old: Iterable[Path], new: Iterable[Path]) -> dict[str, Any]:
    """Compare the tensors of two sets of safetensors files.

    Returns:
        `tensors`, in both; `changed`; `only_old`, `only_new` and `reshaped`, by name; and `largest`:
        `name`, `share` of changed values and `max_abs_difference`. The last is None for integers: codes of
        packed weights are compared as stored, and differences between them mean nothing.
    """
    with ExitStack() as stack:
        before, after = _open(stack, old), _open(stack, new)
        both = sorted(before.keys() & after.keys())
        reshaped: list[str] = []
        changed: list[dict[str, Any]] = []
        for name in both:
            was, now = before[name].get_tensor(name), after[name].get_tensor(name)
            if was.shape != now.shape or was.dtype != now.dtype:
                reshaped.append(name)
            elif count := int((was != now).sum()):
                difference = (
                    float((now.float() - was.float()).abs().max()) if was.is_floating_point() else None
                )
                changed.append({"name": name, "share": count / was.numel(), "max_abs_difference": difference})
        return {
            "tensors": len(both),
            "changed": len(changed) + len(reshaped),
            "only_old": sorted(before.keys() - after.keys()),
            "only_new": sorted(after.keys() - before.keys()),
            "reshaped": reshaped,
            "largest": sorted(changed, key=lambda entry: (-entry["share"], entry["name"]))[:_LISTED],
        }


def _open(stack: ExitStack, files: Iterable[Path]) -> dict[str, Any]:
    """Map each tensor's name to the open file that holds it."""
    handles = [stack.enter_context(safe_open(file, "pt")) for file in files]
    return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

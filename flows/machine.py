"""What this process may use of the machine: CPU threads, memory and cards.

The machine's totals overstate what a process may use. `taskset`, a container or a batch system gives a
process fewer cores and less memory than there are: its affinity says which cores, its control groups
(cgroups) say how much of their time and how much memory. A limit holds for a group and for all groups inside
it, so this module reads those of the process's own group and of every group above it, in both versions of the
kernel's interface.

A card is a GPU that CUDA shows. If `CUDA_VISIBLE_DEVICES` is set, its names are kept as they are. Otherwise
NVML lists the cards, a part of a card that is divided (MIG) by the name of the part.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil

VISIBLE = "CUDA_VISIBLE_DEVICES"
_PROC = Path("/proc/self")
_DRIVERS = tuple(map(Path, ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/kfd")))
"""A file of each kind of driver that torch's CUDA may use."""


def threads() -> int:
    """Return how many CPU threads this process can keep busy, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas()])))


def memory() -> int:
    """Return the bytes that are free for this process; what can be dropped, as cached files, is free."""
    return max(0, min([psutil.virtual_memory().available, *_rooms()]))


def has_driver() -> bool:
    """Tell whether this machine may have a card, without importing torch to ask it."""
    return any(file.exists() for file in _DRIVERS)


def cards() -> tuple[str, ...]:
    """Return the cards by the names that `CUDA_VISIBLE_DEVICES` takes.

    Of cards of several kinds only those of the commonest kind count, as a result must not depend on which
    card was free. To choose others, set `CUDA_VISIBLE_DEVICES`.
    """
    named = os.environ.get(VISIBLE)
    if named is not None:  # CUDA stops at the first name that is none, such as -1
        names = (name.strip() for name in named.split(","))
        return tuple(dict.fromkeys(takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names)))
    kinds = dict(_listed())
    counts = Counter(kinds.values())
    return tuple(name for name, kind in kinds.items() if kind == counts.most_common(1)[0][0])


def occupied(card: str) -> int:
    """Return the bytes in use on a card, by any process; 0 if NVML cannot tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        by = pynvml.nvmlDeviceGetHandleByIndex if card.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        handle = by(int(card) if card.isdigit() else card)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
    except pynvml.NVMLError:
        return 0


def _listed() -> Iterator[tuple[str, str]]:
    """Yield the name and kind of each card, or of each part of a card that is divided."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver
        return
    for handle in handles:
        for device in _parts(handle) or [handle]:
            yield pynvml.nvmlDeviceGetUUID(device), pynvml.nvmlDeviceGetName(device)


def _parts(handle: Any) -> list[Any]:
    """Return the parts of a card that is divided; none of one that is whole."""
    import pynvml

    parts = []
    try:
        divided, _ = pynvml.nvmlDeviceGetMigMode(handle)
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if divided else 0
    except pynvml.NVMLError:  # cannot be divided
        return []
    for number in range(count):
        with contextlib.suppress(pynvml.NVMLError):  # there are fewer than there may be
            parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
    return parts


def _quotas() -> Iterator[float]:
    """Yield the CPU quota of each control group, in cores."""
    for group in _groups("cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")  # version 2
        quota = quota or _text(group / "cpu.cfs_quota_us")  # version 1, -1 for none
        period = period or _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _rooms() -> Iterator[int]:
    """Yield the bytes that each control group may still take."""
    for group in _groups("memory"):
        limit = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes")
        used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            facts = dict(line.split() for line in _text(group / "memory.stat").splitlines())
            files = (facts.get(f"total_{key}", facts.get(key, 0)) for key in ("active_file", "inactive_file"))
            yield int(limit) - int(used) + sum(map(int, files))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folder of this process's control group and of every group above it."""
    paths = {}
    for line in _text(_PROC / "cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), Path(own)))
    for line in _text(_PROC / "mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        key = "" if kind == "cgroup2" else controller
        if key not in paths or not (kind == "cgroup2" or controller in options.split(",")):
            continue
        path = paths[key]
        root, top = mount.split(" ")[3:5]
        # A container may see its own group as the root of the mount.
        inside = path.relative_to(root) if path.is_relative_to(root) else Path()
        if ".." in inside.parts:
            inside = Path()
        yield from (Path(top) / group for group in (inside, *inside.parents))


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

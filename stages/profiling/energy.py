"""Energy, on machines that count it: that of the CPU's packages, or of the GPU's board.

Processors of Intel and AMD count the energy of each package (RAPL), which Linux shows under `powercap`,
usually to root only; virtual machines rarely have it. NVIDIA's boards have counted theirs since Volta, which
NVML (`nvidia-ml-py`) reads. Without a counter there is no figure: an estimate from a processor's rated
power would differ between two models only as their times do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from stages.core.lazy import torch

POWERCAP = Path("/sys/class/powercap")
NO_COUNTER = "not measured"
_MICRO, _MILLI = 1e-6, 1e-3


class Meter:
    """Joules spent since construction, by the counters of `device`.

    Attributes:
        source: the kind of counter; `not measured` without one.
    """

    def __init__(self, device: torch.device) -> None:
        self._counters = _nvml(device) if device.type == "cuda" else _rapl()
        self.source = self._counters.source
        self._start = self._counters.read()

    def joules(self) -> float | None:
        """Return the energy spent so far; None without a counter. A counter may have wrapped around once."""
        now = self._counters.read()
        if not now:
            return None
        span = self._counters.span
        return sum((now[name] - before) % span[name] for name, before in self._start.items())


class _Counters(NamedTuple):
    read: Callable[[], Mapping[str, float]]
    """Returns the joules of each counter."""
    span: Mapping[str, float]
    """The joules at which each counter wraps around."""
    source: str


_NONE = _Counters(dict, {}, NO_COUNTER)


def _rapl() -> _Counters:
    """Return one counter a package; the zones below it, such as cores and memory, are parts of it."""
    zones = {
        zone.name: zone
        for zone in sorted(POWERCAP.glob("*-rapl:*"))
        if zone.name.count(":") == 1 and "mmio" not in zone.name and _readable(zone / "energy_uj")
    }
    if not zones:
        return _NONE
    span = {name: int((zone / "max_energy_range_uj").read_text()) * _MICRO for name, zone in zones.items()}

    def read() -> dict[str, float]:
        return {name: int((zone / "energy_uj").read_text()) * _MICRO for name, zone in zones.items()}

    return _Counters(read, span, "RAPL, CPU packages")


def _nvml(device: torch.device) -> _Counters:
    try:
        import pynvml
    except ImportError:
        return _NONE
    try:
        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except pynvml.NVMLError:  # no driver, or a board without a counter
        return _NONE

    def read() -> dict[str, float]:
        return {"board": pynvml.nvmlDeviceGetTotalEnergyConsumption(board) * _MILLI}

    return _Counters(read, {"board": 2**63 * _MILLI}, "NVML, GPU board")


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:
        return False
    return True

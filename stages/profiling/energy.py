"""Energy, where the machine counts it: the counters of the CPU's packages, or that of the GPU's board.

Intel's and AMD's processors count the energy of each package (RAPL), which Linux shows under `powercap`,
mostly to root alone; virtual machines seldom have it. NVIDIA's boards count theirs since Volta, read through
NVML (`nvidia-ml-py`). Where there is no counter nothing is said: a figure made from a processor's
rated power would be an estimate, and no two models would differ in it but by their time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from stages.core.lazy import torch

POWERCAP = Path("/sys/class/powercap")
NOT_MEASURED = "not measured"
MICRO, MILLI = 1e-6, 1e-3


class Meter:
    """Joules from here on, by the counters of `device`.

    Attributes:
        source: what counts, `not measured` where nothing does.
    """

    def __init__(self, device: torch.device) -> None:
        self._read, self._span, self.source = _nvml(device) if device.type == "cuda" else _rapl()
        self._start = self._read()

    def joules(self) -> float | None:
        """What was spent since; None where nothing counts. A counter may have begun anew once."""
        now = self._read()
        if not now:
            return None
        return sum((now[name] - before) % self._span[name] for name, before in self._start.items())


Counters = tuple[Callable[[], Mapping[str, float]], Mapping[str, float], str]
"""What reads joules by counter, where each begins anew, and their name."""


def _rapl() -> Counters:
    """One counter a package; its zones (cores, memory) are parts of it."""
    zones = {
        zone.name: zone
        for zone in sorted(POWERCAP.glob("*-rapl:*"))
        if zone.name.count(":") == 1 and "mmio" not in zone.name and _readable(zone / "energy_uj")
    }
    span = {name: int((zone / "max_energy_range_uj").read_text()) * MICRO for name, zone in zones.items()}

    def read() -> dict[str, float]:
        return {name: int((zone / "energy_uj").read_text()) * MICRO for name, zone in zones.items()}

    return read, span, "RAPL, CPU packages" if zones else NOT_MEASURED


def _nvml(device: torch.device) -> Counters:
    try:
        import pynvml
    except ImportError:
        return dict, {}, NOT_MEASURED
    try:
        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except pynvml.NVMLError:  # no driver, or a board that does not count
        return dict, {}, NOT_MEASURED

    def read() -> dict[str, float]:
        return {"board": pynvml.nvmlDeviceGetTotalEnergyConsumption(board) * MILLI}

    return read, {"board": 2**63 * MILLI}, "NVML, GPU board"


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:
        return False
    return True

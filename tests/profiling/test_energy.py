"""Energy from the counters of CPU packages and of a GPU's board."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.profiling import energy
from stages.profiling.energy import Meter

CPU = torch.device("cpu")


def counter(folder: Path, name: str, microjoules: int) -> None:
    """Set a counter of `powercap`, which wraps around at 10 joules."""
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")


def test_energy_is_that_of_the_packages_and_survives_a_wrap_around(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    counter(tmp_path, "intel-rapl:0", 1_000_000)
    counter(tmp_path, "intel-rapl:1", 9_000_000)
    counter(tmp_path, "intel-rapl:0:0", 0)  # the cores, a part of package 0
    meter = Meter(CPU)
    counter(tmp_path, "intel-rapl:0", 3_500_000)
    counter(tmp_path, "intel-rapl:1", 500_000)
    counter(tmp_path, "intel-rapl:0:0", 2_000_000)
    assert meter.joules() == pytest.approx(2.5 + 1.5)
    assert meter.source == "RAPL, CPU packages"


def test_without_a_counter_energy_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    meter = Meter(CPU)
    assert meter.joules() is None and meter.source == energy.NO_COUNTER


def test_energy_of_a_board_is_nvmls(monkeypatch):
    millijoules = iter([0, 5_000, 12_000])
    fake = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid, NVMLError=RuntimeError,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(millijoules),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    meter = Meter(torch.device("cuda"))
    assert meter.joules() == pytest.approx(7.0) and meter.source == "NVML, GPU board"


def test_a_board_without_a_counter_is_not_measured(monkeypatch):
    def fails(_):
        raise RuntimeError

    fake = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid, NVMLError=RuntimeError,
        nvmlDeviceGetTotalEnergyConsumption=fails,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    meter = Meter(torch.device("cuda"))
    assert meter.joules() is None and meter.source == energy.NO_COUNTER

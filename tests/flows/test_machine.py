"""What this process may use: affinity, control groups of both versions, cards named or listed."""

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from flows import machine
from tests import project

GIB = 2**30


class NVMLError(Exception):
    """As pynvml's."""


def fake_nvml(kinds, divided=(), used=0):
    """NVML with a card for each of `kinds`; those in `divided` have two parts."""

    def mig(handle):
        if handle in divided:
            return [1, 1]
        raise NVMLError

    def part(handle, number):
        if number == 2:
            raise NVMLError
        return f"{handle}/{number}"

    def by_uuid(uuid):
        assert uuid.startswith(("GPU-", "MIG-"))
        return uuid

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(kinds),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetMigMode=mig,
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 3,
        nvmlDeviceGetMigDeviceHandleByIndex=part,
        nvmlDeviceGetUUID=lambda handle: f"MIG-{handle}" if isinstance(handle, str) else f"GPU-{handle}",
        nvmlDeviceGetName=lambda handle: kinds[int(str(handle)[0])],
        nvmlDeviceGetMemoryInfo=lambda handle, version: SimpleNamespace(used=used),
        nvmlMemory_v2=2,
    )


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A place for control groups; the process has 8 cores and 16 GiB outside of them."""
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * GIB))
    return tmp_path


def mount(groups, kind, root, options, own):
    """Mount a hierarchy at `fs/<options>` and put the process into group `own`."""
    top = groups / "fs" / options
    top.mkdir(parents=True)
    with (groups / "mountinfo").open("a") as file:
        file.write(f"31 23 0:28 {root} {top} rw,relatime shared:9 - {kind} {kind} rw,{options}\n")
    with (groups / "cgroup").open("a") as file:
        file.write(f"0::{own}\n" if kind == "cgroup2" else f"4:{options}:{own}\n")
    return top


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_taskset_leaves_one_thread():
    code = "from flows import machine; print(machine.threads())"
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, "-c", code],
        env={**project.ENV, **project.importing(project.ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1\n"


def test_without_groups_the_machine_decides(groups):
    assert (machine.threads(), machine.memory()) == (8, 16 * GIB)


def test_groups_of_version_2_and_those_above_limit(groups):
    top = mount(groups, "cgroup2", "/", "nsdelegate", "/user/job")
    fill(top / "user/job", cpu__max="max 100000", memory__max="max", memory__current=GIB)
    fill(top / "user", cpu__max="350000 100000", memory__max=4 * GIB, memory__current=3 * GIB)
    fill(top / "user", memory__stat=f"anon {GIB}\nactive_file {GIB}\ninactive_file {GIB // 2}")
    assert (machine.threads(), machine.memory()) == (3, 5 * GIB // 2)
    fill(top / "user/job", cpu__max="50000 100000", memory__max=GIB // 2)
    assert (machine.threads(), machine.memory()) == (1, 0)


def test_groups_of_version_1(groups):
    cpu = mount(groups, "cgroup", "/", "cpu", "/box")
    memory = mount(groups, "cgroup", "/docker/ab", "memory", "/docker/ab")  # a container's own group
    fill(cpu, cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    fill(cpu / "box", cpu__cfs_quota_us=200_000, cpu__cfs_period_us=100_000)
    fill(memory, memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB)
    fill(memory, memory__stat=f"inactive_file 0\ntotal_inactive_file {GIB // 4}\ntotal_active_file 0")
    assert (machine.threads(), machine.memory()) == (2, 5 * GIB // 4)


def test_a_group_outside_of_what_is_mounted_counts_as_the_mounts_root(groups):
    top = mount(groups, "cgroup2", "/", "rw", "/../../elsewhere")
    fill(top, cpu__max="100000 100000")
    assert machine.threads() == 1


@pytest.mark.parametrize(
    ("named", "cards"),
    [
        ("", ()),
        ("-1", ()),
        ("2,0", ("2", "0")),
        ("0,-1,2", ("0",)),
        ("1,1", ("1",)),
        ("GPU-ab, MIG-GPU-cd/1/0,MIG-ef", ("GPU-ab", "MIG-GPU-cd/1/0", "MIG-ef")),
    ],
)
def test_named_cards_are_passed_on_as_they_are(named, cards, monkeypatch):
    monkeypatch.setenv(machine.VISIBLE, named)
    assert machine.cards() == cards


@pytest.mark.parametrize(
    ("kinds", "divided", "cards"),
    [
        ([], (), ()),
        (["H100", "H100"], (), ("GPU-0", "GPU-1")),
        (["T4", "H100", "H100"], (), ("GPU-1", "GPU-2")),
        (["H100", "H100"], (0, 1), ("MIG-0/0", "MIG-0/1", "MIG-1/0", "MIG-1/1")),
    ],
)
def test_listed_cards_are_of_one_kind_and_divided_ones_in_parts(kinds, divided, cards, monkeypatch):
    monkeypatch.delenv(machine.VISIBLE, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(kinds, divided))
    assert machine.cards() == cards


def test_the_bytes_on_a_card(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(["H100"], used=7))
    assert [machine.occupied(card) for card in ("0", "GPU-0", "MIG-0/1")] == [7, 7, 7]


def test_without_a_driver_there_is_no_card(monkeypatch):
    monkeypatch.delenv(machine.VISIBLE, raising=False)
    if not machine.has_driver():
        assert machine.cards() == () and machine.occupied("0") == 0

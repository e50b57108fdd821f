"""The profile stage: the figures it writes, the settings it refuses, and that nothing runs beside it."""

import json
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from flows import profiles
from flows.graph import Stage, measured_last
from flows.plan import Plan
from flows.resources import Pool
from stages.core.errors import Refusal
from stages.job.load import checked_params
from stages.job.params import Params
from stages.profiling import energy
from stages.profiling.measure import Others, kernels
from tests import families
from tests.pipeline import do, params, profile
from tests.profiling.test_speed import SETTINGS


def chosen(**changes: object) -> Params:
    raw = json.loads(params("llama", {}).model_dump_json())
    return checked_params({**raw, "profile": {**SETTINGS, **changes}})


@pytest.fixture
def idle(monkeypatch):
    """A machine on which nobody else works, whatever the one that runs the tests does."""
    monkeypatch.setattr(Others, "share", lambda self: 0.01)


@pytest.mark.device
@pytest.mark.usefixtures("idle")
def test_the_figures_are_those_of_the_runs(workspace):
    project = chosen()
    do(project)
    profile(project, "base/tiny")
    folder = Path("data/profile/base/tiny")
    facts = json.loads((folder / "profile.json").read_text())
    repeats = pd.read_parquet(folder / "repeats.parquet")
    assert list(repeats.columns) == [
        "candidate", "batch_size", "repeat", "seconds_to_first_token", "seconds_per_token",
    ]  # fmt: skip
    assert repeats["batch_size"].tolist() == [1, 1, 1, 3, 3, 3]
    assert (repeats[["seconds_to_first_token", "seconds_per_token"]] > 0).all(axis=None)
    for batch, (size, rows) in zip(facts["batches"], repeats.groupby("batch_size"), strict=True):
        assert batch["batch_size"] == size
        assert batch["seconds_per_token"]["median"] == rows["seconds_per_token"].median()
        assert batch["seconds_to_first_token"]["low"] == rows["seconds_to_first_token"].quantile(0.25)
        assert batch["tokens_per_second"] == pytest.approx(size / rows["seconds_per_token"].median())
        assert batch["peak_bytes"] > facts["bytes_on_disk"]
        assert (batch["joules_per_token"] is None) == (batch["energy"] == energy.NO_COUNTER)
    linears = sum(isinstance(part, torch.nn.Linear) for part in families.model("llama").modules())
    assert facts["kernels"] == {"Linear on dense bfloat16": linears}
    record = json.loads(Path("data/models/base/tiny/artifact.json").read_text())
    assert facts["bytes_on_disk"] == record["bytes_on_disk"]

    assert "base/tiny" in str(list(profiles.profile_table(profiles.read_profiles()).columns[0].cells))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["base/nothing"]}, r"profile\.candidates: there is no 'base/nothing'"),
        ({"candidates": ["noise/tiny"]}, r"profile\.candidates"),
        ({"candidates": ["base/tiny", "base/tiny"]}, "listed twice"),
        ({"batch_sizes": [1, 1]}, "1 is listed twice"),
        ({"batch_sizes": []}, r"profile\.batch_sizes"),
        ({"repeats": 2}, r"profile\.repeats"),
        ({"new_tokens": 1}, r"profile\.new_tokens"),
    ],
)
def test_bad_settings_are_refused(changes, message, workspace):
    with pytest.raises(Refusal, match=message):
        chosen(**changes)


def test_a_length_beyond_the_model_is_refused(workspace):
    project = chosen(prompt_tokens=250, new_tokens=10)
    do(project)
    with pytest.raises(Refusal, match="250 and new_tokens 10 are more than the 256 positions of base/tiny"):
        profile(project, "base/tiny")
    assert not Path("data/profile").exists()


def test_beside_other_work_nothing_is_stored(workspace, monkeypatch):
    project = chosen()
    do(project)
    monkeypatch.setattr(Others, "share", lambda self: 0.21)
    with pytest.raises(Refusal, match="took 21 % of the processors, more than 20 %, so nothing is stored"):
        profile(project, "base/tiny")
    assert not Path("data/profile").exists()


@pytest.mark.usefixtures("idle")
def test_a_measurement_ends_when_its_time_is_up(workspace):
    project = chosen(minutes=1e-9)
    do(project)
    with pytest.raises(Refusal, match=r"batch size 1 is not measured after profile\.minutes"):
        profile(project, "base/tiny")
    assert not Path("data/profile").exists()


def test_kernels_tell_packed_weights_from_dense():
    packed = torch.nn.Linear(2, 2)
    del packed.weight
    packed.weight_packed = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.int32), requires_grad=False)
    model = torch.nn.Sequential(
        torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2), packed, torch.nn.LayerNorm(2)
    )
    assert kernels(model) == {
        "Linear on dense float32": 1, "Linear on packed weights, unpacked at each call": 1,
    }  # fmt: skip


def test_measurements_come_after_all_else_and_before_the_report():
    graph = {
        name: Stage(name, f"python -m stages.{name}", up, ())
        for name, up in {
            "profile": (),
            "prune": (),
            "tidy": ("profile",),
            "report": ("tidy",),
            "notes": ("report",),
            "evaluate": (),
        }.items()
    }
    assert measured_last(list(graph), graph) == ["prune", "evaluate", "profile", "tidy", "report", "notes"]


def test_own_work_is_not_that_of_others():
    others = Others()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    assert 0 <= others.share() <= 1


def test_profiles_that_do_not_exist_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(Refusal, match="prunequant run profile"):
        profiles.read_profiles()


def test_nothing_runs_beside_a_profile(tmp_path, monkeypatch):
    """Four slots, and two profiles among other stages: the stages at work are one profile, or none."""
    pytest.importorskip("dvc")
    monkeypatch.chdir(tmp_path)
    names = [f"prune@{i}" for i in range(6)] + ["profile@a", "profile@b"]
    graph = {
        name: Stage(name, f"python -m stages.{name.replace('@', ' ')}", (), ())
        for name in (*names[:3], names[6], names[7], *names[3:6])
    }
    plan = Plan(graph, Pool(4), stale=set(graph))
    at_work: list[str] = []
    seen: list[list[str]] = []
    lock = threading.Lock()

    def repro(stage, show, force, variables):
        with lock:
            at_work.append(stage)
            seen.append(list(at_work))
        time.sleep(0.05)
        with lock:
            at_work.remove(stage)
        return 0, ""

    monkeypatch.setattr(plan.children, "repro", repro)
    threads = [threading.Thread(target=plan.advance, args=(name,)) for name in graph]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(seen) == 8 and max(map(len, seen)) > 1
    assert all(len(together) == 1 for together in seen if any("profile" in name for name in together))

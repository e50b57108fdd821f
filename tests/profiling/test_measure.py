"""The profile stage: the figures it writes, the settings it refuses, and that nothing runs beside it."""

import json
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from flows.graph import Stage
from flows.plan import Plan
from flows.resources import Pool
from stages.core.errors import Refusal
from stages.job.load import checked_params
from stages.job.params import Params
from stages.profiling import energy
from stages.profiling.measure import Others
from tests.pipeline import do, params, profile
from tests.profiling.test_speed import SETTINGS


def chosen(**changes: object) -> Params:
    raw = json.loads(params("llama", {}).model_dump_json())
    return checked_params({**raw, "profile": {**SETTINGS, **changes}})


@pytest.mark.device
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
    record = json.loads(Path("data/models/base/tiny/artifact.json").read_text())
    assert facts["bytes_on_disk"] == record["bytes_on_disk"]
    from flows import profiles

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


def test_own_work_is_not_that_of_others():
    others = Others()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    assert 0 <= others.share() <= 1


def test_profiles_that_do_not_exist_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from flows import profiles

    with pytest.raises(Refusal, match="prunequant run profile"):
        profiles.read_profiles()


def test_nothing_runs_beside_a_profile(tmp_path, monkeypatch):
    """Four slots, and two profiles among other stages: the stages at work are one profile, or none."""
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

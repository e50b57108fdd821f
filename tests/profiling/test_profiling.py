"""The profile stage: what it counts, what it refuses, and that nothing runs beside it."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from flows import profiles
from flows.graph import Stage
from flows.plan import Run
from stages.core.errors import Refusal
from stages.job.load import validate
from stages.job.params import Params
from stages.profiling import energy, speed
from stages.profiling.energy import Meter
from stages.profiling.measure import Others
from tests import families
from tests.pipeline import do, params, profile

CPU = torch.device("cpu")
SETTINGS = {
    "candidates": ["base/tiny"], "batch_sizes": [1, 3], "prompt_tokens": 8, "new_tokens": 5, "warmup": 1,
    "repeats": 3, "threads": 1,
}  # fmt: skip


def chosen(**changes: object) -> Params:
    raw = json.loads(params("llama", {}).model_dump_json())
    return validate({**raw, "profile": {**SETTINGS, **changes}})


def test_what_was_measured_is_what_is_written(workspace):
    wanted = chosen()
    do(wanted)
    profile(wanted, "base/tiny")
    folder = Path("data/profile/base/tiny")
    told = json.loads((folder / "profile.json").read_text())
    repeats = pd.read_parquet(folder / "repeats.parquet")
    assert list(repeats.columns) == [
        "candidate", "batch_size", "repeat", "seconds_to_first_token", "seconds_per_token",
    ]  # fmt: skip
    assert repeats["batch_size"].tolist() == [1, 1, 1, 3, 3, 3]
    assert (repeats[["seconds_to_first_token", "seconds_per_token"]] > 0).all(axis=None)
    for batch, (size, rows) in zip(told["batches"], repeats.groupby("batch_size"), strict=True):
        assert batch["batch_size"] == size
        assert batch["seconds_per_token"]["median"] == rows["seconds_per_token"].median()
        assert batch["seconds_to_first_token"]["low"] == rows["seconds_to_first_token"].quantile(0.25)
        assert batch["tokens_per_second"] == pytest.approx(size / rows["seconds_per_token"].median())
        assert batch["peak_bytes"] > told["bytes_on_disk"]
        assert (batch["joules_per_token"] is None) == (batch["energy"] == energy.NOT_MEASURED)
    artifact = json.loads(Path("data/models/base/tiny/artifact.json").read_text())
    assert told["bytes_on_disk"] == artifact["bytes_on_disk"]
    assert "base/tiny" in str(list(profiles.profile_table(profiles.read_profiles()).columns[0].cells))


@pytest.mark.parametrize("family", families.CONFIGS)
def test_length_is_fixed_whatever_the_model_says(family, monkeypatch):
    """A model that says the end of text at once still writes as many tokens, each after those before."""
    model = families.model(family)
    read: list[tuple[int, ...]] = []
    before = model.forward

    def forward(*args, **options):
        read.append(tuple(options["input_ids"].shape))
        told = before(*args, **options)
        told.logits[..., 257] = 1e4
        return told

    monkeypatch.setattr(model, "forward", forward)
    clock = speed.generate(model, torch.arange(12).reshape(2, 6), 5)
    assert read == [(2, 6), *[(2, 1)] * 4]
    assert len(clock) == 5 and clock == sorted(clock)


def test_greedy_tokens_are_those_of_generate():
    model = families.model("llama").float()
    prompts = torch.arange(12).reshape(2, 6)
    read: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, __, options: read.append(options["input_ids"]), with_kwargs=True
    )
    speed.generate(model, prompts, 5)
    wrote = torch.cat(read[1:], 1)
    options = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 258}
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert torch.equal(wrote, expected[:, 6:10])


def test_times_are_split_at_the_first_token():
    wanted = chosen_profile()
    (first, *_) = wanted.runs(lambda: [2.0, 2.5, 3.0, 3.5, 6.0])
    assert first == {"repeat": 0, "seconds_to_first_token": 2.0, "seconds_per_token": 1.0}


def chosen_profile(**changes: object) -> speed.Profile:
    values = {**SETTINGS, **changes}
    return speed.Profile(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def test_prompts_are_drawn_from_the_seed():
    wanted = chosen_profile()
    assert torch.equal(wanted.prompts(2, 50, 3), wanted.prompts(2, 50, 3))
    assert not torch.equal(wanted.prompts(2, 50, 3), wanted.prompts(2, 50, 4))
    assert wanted.prompts(2, 50, 3).shape == (2, 8)


@pytest.mark.parametrize(
    ("changes", "told"),
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
def test_bad_settings_are_refused(changes, told, workspace):
    with pytest.raises(Refusal, match=told):
        chosen(**changes)


def test_a_length_beyond_the_model_is_refused(workspace):
    wanted = chosen(prompt_tokens=250, new_tokens=10)
    do(wanted)
    with pytest.raises(Refusal, match="250 and new_tokens 10 are more than the 256 positions of base/tiny"):
        profile(wanted, "base/tiny")
    assert not Path("data/profile").exists()


def counter(folder: Path, name: str, microjoules: int) -> Path:
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")
    return zone


def test_energy_is_the_packages_counters_and_goes_on_past_their_end(tmp_path, monkeypatch):
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
    assert meter.joules() is None and meter.source == "not measured"


def test_energy_of_a_board_is_nvmls(monkeypatch):
    joules = iter([0, 5_000, 12_000])
    fake = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid, NVMLError=RuntimeError,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(joules),
    )  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    meter = Meter(torch.device("cuda"))
    assert meter.joules() == pytest.approx(7.0) and meter.source == "NVML, GPU board"


def test_a_peak_forgets_what_was_freed_before_it():
    held = torch.ones(2**26)  # 256 MB
    high = speed.Peak(CPU).bytes()
    del held
    low = speed.Peak(CPU).bytes()
    assert high is not None and low is not None and high - low > 2**27


def test_own_work_is_not_that_of_others():
    others = Others()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    assert 0 <= others.share() <= 1


def test_no_profiles_are_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    run = Run(graph, set(graph), list(graph), 4)
    at_work: list[str] = []
    seen: list[list[str]] = []
    lock = threading.Lock()

    def repro(stage, show):
        with lock:
            at_work.append(stage)
            seen.append(list(at_work))
        time.sleep(0.05)
        with lock:
            at_work.remove(stage)
        return 0, ""

    monkeypatch.setattr(run.children, "repro", repro)
    threads = [threading.Thread(target=run.advance, args=(name,)) for name in graph]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(seen) == 8 and max(map(len, seen)) > 1
    assert all(len(together) == 1 for together in seen if any("profile" in one for one in together))

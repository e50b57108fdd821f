"""The benchmark of a device, small and on the CPU: its parts, its bounds, and its lines on a failure."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import device
from benchmarks.device import METHODS, Report, block_times, compared, llama
from benchmarks.limits import BlockWork, Limits
from stages.compress.method import WeightMethod
from stages.job.params import methods
from stages.sources.documents import split_calibration
from tests import families, project

ROOT = project.ROOT


def run(*options: str) -> tuple[int, list[dict], str]:
    """Run the benchmark as its user does; return its exit code, its lines and the table."""
    command = [sys.executable, "-m", "benchmarks.device", "--device", "cpu", *options]
    done = subprocess.run(command, cwd=ROOT, env=project.ENV, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    facts = [json.loads(line) for line in lines if line.startswith("{")]
    return done.returncode, facts, "\n".join(line for line in lines if not line.startswith("{"))


def test_every_method_that_changes_one_weight_at_a_time_has_a_bound():
    changing = {
        name: section
        for section in ("prune", "quantize")
        for name, settings in methods(section).items()
        if issubclass(settings, WeightMethod)
    }
    assert {name: entry.stage for name, entry in METHODS.items()} == changing, (
        "give a new method a line in benchmarks.device.METHODS"
    )


def test_the_work_of_a_block_is_that_of_its_matrices():
    work = BlockWork.of(llama(4096, 8, 2048), samples=128, length=2048)
    assert work.bytes == 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    # 32 blocks: 3.80 and 2.15 PFLOP, 135 and 48 TFLOP
    assert 32 * work.forward == pytest.approx(3.80e15, rel=0.01)
    assert 32 * work.hessians == pytest.approx(2.15e15, rel=0.01)
    assert 32 * work.factors == pytest.approx(135e12, rel=0.01)
    assert 32 * work.updates == pytest.approx(48e12, rel=0.01)


def test_a_limit_adds_up_what_a_method_needs():
    work = BlockWork(bytes=16, forward=100, hessians=200, factors=30, updates=20)
    limits = Limits(10, 5, copy_bytes=16, upload_bytes=4, download_bytes=2, read_bytes=8, write_bytes=1)
    moved = 4 + 8 + 1
    assert work.seconds(limits, forward=False, hessians=False) == moved
    assert work.seconds(limits, forward=True, hessians=False) == moved + 10
    assert work.seconds(limits, forward=True, hessians=True) == moved + 10 + 20 + 10
    assert work.disk_seconds(limits) == 2 + 16


def report() -> Report:
    return Report(argparse.Namespace(seconds=60.0))


def test_a_case_that_fails_or_has_no_time_is_a_line_and_the_rest_goes_on(capsys):
    told = report()
    told.give(1.0)

    def fail() -> dict:
        raise ValueError("no such thing")

    told.case("table", "first", fail)
    told.case("table", "second", lambda: {"value": 1})
    assert not told.sound
    told.give(0.0)
    told.case("table", "third", lambda: {"value": 2})
    assert "ValueError: no such thing" in told.lines[0]["error"]
    assert told.lines[1]["value"] == 1 and told.lines[2]["skipped"].startswith("no time left")
    assert told.exit_code() == 1
    told.sound = True
    assert told.exit_code() == 2, "what was not tried is no success"
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == told.lines


def test_a_broken_bound_is_not_sound(capsys):
    told = report()
    told.give(1.0)
    told.case("parity", "a", lambda: {"ok": True})
    assert told.sound
    told.case("parity", "b", lambda: {"ok": False})
    told.case("parity", "c", lambda: {"ok": True})
    assert not told.sound


@pytest.mark.parametrize("name", ["wanda", "gptq", "nf4"])
def test_parity_counts_the_entries_and_codes_that_differ(name, workspace, monkeypatch):
    """The device is the CPU, with one weight in ten moved on its way."""
    device.write_random(Path("data/models/base/small"), llama(64, 2, 256), families.tokenizer())
    rest = {"num_samples": 4, "sequence_length": 32}, families.windows(2, 32), METHODS[name].bound
    same = compared("cpu", "base/small", name, *rest)
    assert same["share"] == 0 and same["perplexity"] == 0 and same["ok"]

    plain, calls = device.choices, []

    def moved(artifact: str) -> dict[str, torch.Tensor]:
        chosen = plain(artifact)
        calls.append(artifact)
        if len(calls) == 2:
            for tensor in chosen.values():
                flat = tensor.view(-1)[::10]
                flat.copy_(~flat if tensor.dtype == torch.bool else flat + 1)
        return chosen

    monkeypatch.setattr(device, "choices", moved)
    other = compared("cpu", "base/small", name, *rest)
    assert other["share"] == pytest.approx(0.1, abs=0.01) and not other["ok"]


def test_the_text_for_smollm2_has_enough_english_in_both_parts():
    calibration, evaluation, dropped = split_calibration(device.english().split("\n\n"), 0.5)
    calibrated = device.ENGLISH["num_samples"] * device.ENGLISH["sequence_length"]
    for documents, tokens in ((calibration, calibrated), (evaluation, 16 * 128)):
        assert len(" ".join(documents).split()) > tokens  # a word is a token or more
    assert dropped < 10 and " the " in evaluation[0]


def test_blocks_are_timed_in_the_stages_own_walk(workspace):
    device.write_random(Path("data/models/base/small"), llama(64, 3, 256), families.tokenizer())
    windows = {"num_samples": 4, "sequence_length": 32}
    recipe = METHODS["wanda"].recipe("wanda", "base/small", windows)
    with block_times() as begun:
        device.make("prune/timed", recipe, device.run_on("cpu"))
    assert begun == sorted(begun) and len(begun) >= 3


@pytest.mark.drill
@pytest.mark.device
def test_every_stage_gives_the_same_bytes_twice(tmp_path, inputs):
    runs = [device.whole_project(families.DEVICE, tmp_path / name, inputs) for name in ("first", "second")]
    assert device.same(*runs) == {"differ": [], "ok": True}
    folders = {str(Path(name).parent) for name in runs[0]}
    assert folders >= {
        "models/base/tiny", "models/prune/wanda-50", "models/quantize/wanda-50-gptq-w4g32",
        "models/finetune/wanda-50-lora", "models/noise/tiny-batch-3", "models/floor/dot", "datasets/taught",
        "results/finetune/wanda-50-lora/news", "results/base/tiny/brackets", "results/floor/dot/news",
    }  # fmt: skip


@pytest.mark.drill
def test_all_parts_run_on_a_cpu(tmp_path):
    small = ["--hidden", "64", "--blocks", "2", "--samples", "4", "--length", "32", "--side", "64"]
    code, lines, table = run(*small, "--seconds", "900", "--json", str(tmp_path / "lines"))
    assert code == 0, lines
    assert [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()] == lines
    cases = {part: [line for line in lines if line["part"] == part] for part in device.SHARES}
    assert len(cases["parity"]) >= len(METHODS)
    assert all(line["ok"] for part in ("parity", "determinism", "resume") for line in cases[part])
    assert all(line["killed"] and line["files_kept"] for line in cases["resume"])
    rows = {line["case"]: line for line in cases["table"]}
    assert rows.keys() == {"limits", *device.ROWS}
    for name in device.ROWS:
        row = rows[name]
        assert row["seconds_per_block"] > 0 and row["limit"] > 0 and name in table
        assert ("tokens_per_second" in row) == (name != "magnitude-50")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["device"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.main()
    assert capsys.readouterr().out == "no GPU\n"


def test_training_is_timed_with_the_mask_of_the_zeros_and_without():
    small = ("--hidden", "64", "--blocks", "2", "--length", "64", "--vocabulary", "512", "--batch", "2")
    code, lines, _ = run("--only", "training", *small)
    cases = {line["case"]: line for line in lines if line["part"] == "training"}
    assert code == 0 and list(cases) == ["prune", "lora, keep: none", "lora, keep: mask"]
    plain, masked = cases["lora, keep: none"], cases["lora, keep: mask"]
    ratio = masked["seconds_per_step"] / plain["seconds_per_step"]
    assert masked["over_without_mask"] == pytest.approx(ratio, rel=0.01) and "over_without_mask" not in plain


def test_memory_limits_a_card_alone():
    assert run("--memory", "1") == (2, [], "")

"""The stage: a killed run ends with the bytes of one never killed, and failures leave nothing behind."""

import csv
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from stages.core.errors import Refusal
from stages.job.params import Params
from stages.recovery import objective, saves, training
from tests.pipeline import NONE, altered, do, finetune, params
from tests.tuned import LORA, TEXT

pytestmark = pytest.mark.device

SOURCE = {
    "lora": "prune/half", "full": "prune/half", "qat": "quantize/four", "eco": "quantize/four",
}  # fmt: skip
SOURCES = {
    "prune/half": {
        "source": "base/tiny", "method": "magnitude", "sparsity": 0.5, "scope": "matrix", "calibration": NONE,
    },
    "quantize/four": {
        "source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE,
    },
}  # fmt: skip
TRAINED = {"train": TEXT, "learning_rate": 0.01, "steps": 5, "batch_size": 2, "checkpoint_every": 2}
TAKE_STEP = training.take_step


class Killed(BaseException):
    """The end of a killed process."""


def job(method: str, **options: Any) -> Params:
    """Return params with the recipe finetune/it: GPT-2, which draws dropout, for `full`; else llama."""
    settings = {"source": SOURCE[method], "method": method, **TRAINED, **(LORA if method == "lora" else {})}
    return params("gpt2" if method == "full" else "llama", SOURCES | {"finetune/it": settings | options})


def output() -> dict[str, bytes]:
    files = [*Path("data/models/finetune/it").iterdir(), Path("data/curves/it.csv")]
    return {file.name: file.read_bytes() for file in files}


def stepping(take_step: Callable[..., float]) -> Any:
    """Patch the loop's step."""
    return mock.patch.object(training, "take_step", take_step)


def kill(chosen: Params, at: int) -> None:
    """Run the stage and kill it before step `at`."""

    def killed(recipe, arm, parts, step, rate):
        if step == at:
            raise Killed
        return TAKE_STEP(recipe, arm, parts, step, rate)

    with stepping(killed), pytest.raises(Killed):
        finetune(chosen, "it")


def finish(chosen: Params) -> list[int]:
    """Run the stage to its end and return the steps it took."""
    taken = []

    def watched(recipe, arm, parts, step, rate):
        taken.append(step)
        return TAKE_STEP(recipe, arm, parts, step, rate)

    with stepping(watched):
        finetune(chosen, "it")
    return taken


@pytest.mark.parametrize("method", list(SOURCE))
def test_killed_at_any_step_the_next_run_ends_with_the_same_bytes(method, workspace):
    chosen = job(method)
    do(chosen, [SOURCE[method]])
    assert finish(chosen) == list(range(5))
    expected = output()
    assert {"model.safetensors", "artifact.json", "it.csv"} <= set(expected)
    for step in range(5):
        shutil.rmtree("data/models/finetune")
        shutil.rmtree("data/curves")
        kill(chosen, step)
        assert finish(chosen) == list(range(step // 2 * 2, 5))
        assert output() == expected
        assert not list(Path("data/scratch/finetune").rglob("*.*"))


def test_killed_while_it_writes_a_checkpoint_it_resumes_from_the_one_before(workspace):
    chosen = job("full")
    do(chosen, ["prune/half"])
    finish(chosen)
    expected = output()
    for module, name in ((safetensors.torch, "save_file"), (saves, "write_json")):
        writes = [getattr(module, name), Killed]

        def write(*args, writes=writes):
            writer = writes.pop(0)
            if writer is Killed:
                raise Killed
            writer(*args)

        with mock.patch.object(module, name, write), pytest.raises(Killed):
            finetune(chosen, "it")
        assert finish(chosen) == [2, 3, 4]
        assert output() == expected


@pytest.mark.parametrize("change", ["recipe", "source", "text"])
def test_a_checkpoint_of_other_inputs_is_deleted(change, workspace):
    chosen = job("full")
    do(chosen, ["prune/half"])
    kill(chosen, 3)
    (left,) = Path("data/scratch/finetune/it").iterdir()
    if change == "recipe":
        chosen = job("full", learning_rate=0.02)
    else:
        file = {
            "source": "data/models/prune/half/model.safetensors",
            "text": "data/datasets/news/evaluation.parquet",
        }
        altered(Path(file[change]))
    kill(chosen, 4)
    assert not left.exists()
    (kept,) = Path("data/scratch/finetune/it").iterdir()
    assert sorted(file.name for file in kept.iterdir()) == ["step-000004.json", "step-000004.safetensors"]


def test_the_curve_has_a_row_per_step(workspace):
    chosen = job("lora", evaluate_at=[0, 5])
    do(chosen, ["prune/half", "finetune/it"])
    with Path("data/curves/it.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert list(curve[0]) == ["step", "tokens", "learning_rate", "train_loss", "heldout_loss"]
    assert [int(row["step"]) for row in curve] == list(range(6))
    assert [int(row["tokens"]) for row in curve] == [64 * step for step in range(6)]
    assert [bool(row["heldout_loss"]) for row in curve] == [True, *[False] * 4, True]
    assert [bool(row["train_loss"]) for row in curve] == [False, *[True] * 5]
    assert float(curve[-1]["heldout_loss"]) < float(curve[0]["heldout_loss"])


def in_python(*_):
    raise MemoryError


def on_a_cpu(*_, **__):
    return torch.empty(2**46)


def test_a_run_resumes_after_its_inputs_were_rewritten_unchanged_or_memory_ran_out(workspace):
    chosen = job("full")
    do(chosen, ["prune/half"])
    finish(chosen)
    expected = output()
    kill(chosen, 3)
    Path("data/models/prune/half/model.safetensors").touch()
    with (
        mock.patch.object(objective, "batch_loss", in_python),
        pytest.raises(Refusal, match="not enough memory"),
    ):
        finetune(chosen, "it")
    assert finish(chosen) == [2, 3, 4]
    assert output() == expected


def test_training_starts_over_if_its_checkpoint_cannot_be_read(workspace, caplog):
    logging.disable(logging.NOTSET)
    chosen = job("full")
    do(chosen, ["prune/half"])
    kill(chosen, 3)
    (kept,) = Path("data/scratch/finetune/it").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:5])
    assert finish(chosen) == list(range(5))
    assert "cannot be read" in caplog.text and "training starts over" in caplog.text


@pytest.mark.parametrize("method", ["full", "lora", "qat", "eco"])
def test_damage_done_by_the_last_step_is_refused(method, workspace):
    chosen = job(method, steps=2, evaluate_at=[0])
    do(chosen, [SOURCE[method]])

    def broken(recipe, arm, parts, step, rate):
        return TAKE_STEP(recipe, arm, parts, step, torch.inf if step == 1 else rate)

    message = "held-out loss became nan at step 2" if method in ("full", "lora") else "became NaN or infinite"
    with stepping(broken), pytest.raises(Refusal, match=rf"{message}.*; lower learning_rate"):
        finetune(chosen, "it")
    assert not Path("data/models/finetune").exists()


@pytest.mark.parametrize(
    "where", ["transformers.AutoModelForCausalLM.from_pretrained", "stages.model.checkpoint.save"]
)
def test_too_little_memory_outside_the_loop_is_refused_too(where, workspace):
    chosen = job("full")
    do(chosen, ["prune/half"])
    with (
        mock.patch(where, on_a_cpu),
        pytest.raises(Refusal, match=r"not enough memory; lower batch_size \(now 2"),
    ):
        finetune(chosen, "it")
    assert not Path("data/models/finetune").exists()

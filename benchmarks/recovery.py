"""The speed of recovery: tokens per second of our loop and of transformers' Trainer, in one run.

    dvc repro model@smollm2 dataset@news
    python -m benchmarks.recovery

Every side trains all parameters of SmolLM2 (or LoRA on all its linears) on the same windows of news, with the
same batch size, accumulation and threads, by AdamW, with a learning rate that warms up and falls. Sides take
turns, each turn from the checkpoint. A step's time is that between the ends of two steps, so loading and the
first step do not count; figures are medians. On a shared machine use `--clock cpu --threads 1`: it counts
processor time, to which other processes add nothing.

- `plain`, `masked`, `lora`: our loop on bf16 weights with fp32 masters; `plain` freezes nothing, the others
  keep the zeros of a model in which the smaller half of every matrix is zero.
- `trainer`: transformers.Trainer in mixed precision as users run it, bf16 autocast over fp32 weights.
- `trainer_bf16`: the same on bf16 weights without masters, which costs less and loses small steps.

Each line is a JSON object. The aim: `masked.speed_over_trainer` (over `trainer`) at least 0.95.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.figures import tell
from stages.compress.select import smallest_overall
from stages.core.run import Run
from stages.corpus.examples import Examples, Train, load_examples
from stages.model.blocks import linears
from stages.recovery.arm import Arm
from stages.recovery.full import Full
from stages.recovery.lora import LoRA
from stages.recovery.saves import Checkpoints
from stages.recovery.training import train
from stages.recovery.tuning import Tuning

MODEL = Path("data/models/base/smollm2")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def recipes(text: Train, options: argparse.Namespace) -> dict[str, Tuning]:
    """Return the recipes of our sides."""
    shared: dict[str, Any] = {
        "source": "base/smollm2", "train": text, "steps": options.steps, "batch_size": options.batch_size,
        "accumulation": options.accumulation, "learning_rate": 1e-5, "evaluate_at": (0,),
    }  # fmt: skip
    return {
        "plain": Full(method="full", keep="none", **shared),
        "masked": Full(method="full", keep="mask", **shared),
        "lora": LoRA(method="lora", keep="mask", rank=8, alpha=16.0, **shared),
    }


def load(dtype: torch.dtype) -> PreTrainedModel:
    """Load the model with the smaller half of every block linear's weights set to zero."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, local_files_only=True)
    for linear in linears(model):
        scores = linear.weight.float().abs()
        linear.weight.masked_fill_(smallest_overall(scores, scores.numel() // 2), 0)
    return model


def between(ends: list[float]) -> list[float]:
    """Return the seconds of each step but the first, from the times at which steps ended."""
    return [later - earlier for earlier, later in pairwise(ends)]


def ours(recipe: Tuning, rows: Examples, clock: Callable[[], float]) -> list[float]:
    """Return the seconds of each step but the first in our loop."""
    arm: Arm = recipe.arm(load(torch.bfloat16), None)
    ends: list[float] = []
    step: Callable[[float], None] = arm.step

    def timed(learning_rate: float) -> None:
        step(learning_rate)
        ends.append(clock())

    arm.step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        train(recipe.method, recipe, arm, rows, Checkpoints(Path(scratch) / "key", recipe.steps or 1))
    return between(ends)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The rows that our loop trains on, as Trainer reads them."""

    def __init__(self, rows: Examples) -> None:
        self.rows = [example for row in rows.train for example in row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index].input_ids, "labels": self.rows[index].labels}


class StepClock(TrainerCallback):
    """Note when each step of the optimizer ends."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(self.clock())


def theirs(recipe: Tuning, rows: Examples, clock: Callable[[], float], dtype: torch.dtype) -> list[float]:
    """Return the seconds of each step but the first in transformers' Trainer."""
    step_clock = StepClock(clock)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=recipe.steps or 1,
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulation,
            learning_rate=recipe.learning_rate,
            warmup_steps=max(1, int(recipe.warmup * (recipe.steps or 1))),
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=True,
            seed=recipe.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model: nn.Module = load(dtype)
        trainer = Trainer(model, arguments, train_dataset=Windows(rows), callbacks=[step_clock])
        trainer.remove_callback(PrinterCallback)  # only figures are printed
        trainer.train()
    return between(step_clock.ends)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="per turn; the first does not count")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    if not (MODEL / "model.safetensors").exists():
        raise SystemExit(f"{MODEL} is missing; run dvc repro model@smollm2 dataset@news.")
    Run(device="cpu", dtype="bfloat16", threads=options.threads, seed=0, numerics="fast").start()
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    text = Train(dataset="news", num_samples=64, held_out=1, sequence_length=options.sequence_length)
    rows = load_examples(text, tokenizer, load(torch.bfloat16).config)
    arms, clock = recipes(text, options), CLOCKS[options.clock]
    sides: dict[str, Callable[[], list[float]]] = {
        name: lambda recipe=recipe: ours(recipe, rows, clock)  # type: ignore[misc]
        for name, recipe in arms.items()
    }
    sides["trainer"] = lambda: theirs(arms["masked"], rows, clock, torch.float32)
    sides["trainer_bf16"] = lambda: theirs(arms["masked"], rows, clock, torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.turns):
        for name, side in sides.items():
            seconds[name] += side()
    tokens = options.batch_size * options.accumulation * options.sequence_length
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    for name, value in speed.items():
        tell(f"{name}.tokens_per_second", value)
    for name in arms:
        tell(f"{name}.speed_over_trainer", speed[name] / speed["trainer"])
    tell("masked.speed_over_trainer_bf16", speed["masked"] / speed["trainer_bf16"])


if __name__ == "__main__":
    main()

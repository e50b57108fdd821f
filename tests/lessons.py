"""Data sets that a tiny model teaches, made by the real stages in the working folder."""

from pathlib import Path
from typing import Any

import torch

from stages.corpus.rows import IGNORED, Example
from stages.corpus.taught import read_lesson
from stages.job.load import checked_params
from stages.job.params import Params
from stages.model.artifact import load_tokenizer
from tests import families, project
from tests.pipeline import download, teach

LOGITS = {
    "source": "base/tiny", "method": "logits", "dataset": "news", "num_samples": 5, "held_out": 3,
    "sequence_length": 24, "top": 8, "batch_size": 2,
}  # fmt: skip
ANSWERS = {
    "source": "base/tiny", "method": "answers", "dataset": "sums", "num_samples": 6, "held_out": 2,
    "max_new_tokens": 6, "batch_size": 3,
}  # fmt: skip
SUMS = {
    "kind": "arithmetic", "seed": 1, "test": 4, "train": 8, "fewshot": 0,
    "levels": [
        {"name": "easy", "operator": "-", "digits": 1, "carries": False},
        {"name": "hard", "operator": "+", "digits": 2, "carries": True},
    ],
}  # fmt: skip
TWICE = {"answered": ANSWERS, "lesson": LOGITS | {"dataset": "answered", "num_samples": 6, "held_out": 2}}
"""Logits on answers of the same teacher."""


def params(**teaching: dict[str, Any]) -> Params:
    """Return fp32 params with the base `tiny`, data sets `news` and `sums`, and these recipes of teach."""
    raw = project.params(Path("inputs"))
    raw["run"]["dtype"] = "float32"
    raw["datasets"]["sums"] = SUMS
    raw["teach"] = teaching
    return checked_params(raw)


def make(chosen: Params) -> None:
    """Download the inputs and teach every data set, in order."""
    for name in ("datasets/news", "datasets/sums", "base/tiny"):
        download(chosen, name)
    for name in chosen.teach:
        teach(chosen, name)


def make_lesson(**options: Any) -> None:
    """Teach the data set `lesson`: `ANSWERS` or, for method logits, `LOGITS`, with these options."""
    make(params(lesson=(LOGITS if options.get("method") == "logits" else ANSWERS) | options))


def read(name: str = "lesson") -> tuple[list[Example], list[Example]]:
    """Return the training and held-out examples of a data set."""
    train, held_out = read_lesson(name, load_tokenizer("base/tiny"))
    return [graded.example for graded in train], [graded.example for graded in held_out]


def prompt(example: Example) -> list[int]:
    """Return the tokens before the answer."""
    return example.input_ids[example.labels == IGNORED].tolist()


def answer(example: Example) -> list[int]:
    """Return the tokens that are predicted."""
    return example.input_ids[example.labels != IGNORED].tolist()


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Return the likeliest tokens after `prompt`, each from a forward of its own, up to the end of text."""
    tokens: list[int] = []
    while len(tokens) < count and families.CONFIGS["llama"].eos_token_id not in tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens], device=model.device)).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens

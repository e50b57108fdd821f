"""Evaluations run through the real stage, and the tables they write."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stages.core import tables
from stages.job.load import checked_params
from stages.job.params import Params
from tests.pipeline import evaluate


def scored(chosen: Params, candidate: str, suite: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run the evaluation and read both of its tables."""
    evaluate(chosen, f"{candidate}/{suite}")
    folder = Path("data/results") / candidate / suite
    return pd.read_parquet(folder / tables.SCORES), pd.read_parquet(folder / tables.SAMPLES)


def changed(chosen: Params, **sections: dict[str, Any]) -> Params:
    """The same params with whole sections replaced."""
    return checked_params({**json.loads(chosen.model_dump_json()), **sections})


def log_likelihood(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    """Natural log of the probability of `continuation` after `context`, one token at a time."""
    total = 0.0
    for number, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([context + continuation[:number]], device=model.device)
            ).logits[0, -1]
        total += float(torch.log_softmax(logits.float(), 0)[token])
    return total

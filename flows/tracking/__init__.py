"""Scores of finished candidates in somebody's tracker, where they are asked for."""

from enum import StrEnum


class Tracker(StrEnum):
    """Where `prunequant log` writes."""

    mlflow = "mlflow"
    wandb = "wandb"

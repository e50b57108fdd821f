"""The splits that a stock task reads, from the parquet files of a data set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stages.core.errors import Refusal
from stages.core.lazy import np
from stages.evaluation.lm_tasks import refused_data

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""The keys of a task's config that name a split."""


def load_splits(task: str, files: dict[str, str], config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Load the splits a task reads and apply its `process_docs`, which is taken out of `config`.

    Args:
        files: the parquet file of each split.

    Raises:
        Refusal: a file is not parquet or has no rows, or `process_docs` cannot use its columns.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    process = config.pop("process_docs", None)
    splits = {}
    for split in dict.fromkeys(config[key] for key in SPLIT_KEYS if config[key]):
        try:
            if not pq.read_metadata(files[split]).num_rows:
                raise Refusal(f"{files[split]} has no item for {task}; download a split that has items.")
            splits[split] = datasets.Dataset.from_parquet(files[split])
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
            raise Refusal(
                f"{files[split]} cannot be read as parquet: {error.__cause__ or error}; download it again."
            ) from error
    if process is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with _uncached(), refused_data(task, splits):
            splits = {split: process(documents) for split, documents in splits.items()}
    for split, documents in splits.items():
        if not len(documents):
            raise Refusal(
                f"{task} keeps no item of {files[split]}; download a split that has items the task keeps."
            )
    return splits


@contextmanager
def _uncached() -> Iterator[None]:
    """Use no results of an earlier `map`, which may depend on another seed."""
    import datasets

    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()

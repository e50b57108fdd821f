"""Benchmarks: every layout of the hub gives one file per split."""

import pandas as pd
import pytest

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources.benchmark import Benchmark


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "test.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"],
        ["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
    ],
)
def test_every_layout_of_the_hub_is_read(names, tmp_path):
    for number, name in enumerate(names):
        (tmp_path / "main" / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"x": [number]}).to_parquet(tmp_path / "main" / name)
    (tmp_path / "out").mkdir()
    benchmark = Benchmark(
        kind="benchmark", source=f"path:{tmp_path}", config="main", sha256=sha256(tmp_path / "main")
    )
    assert benchmark.write(tmp_path / "out") == {"splits": ["test", "train"]}
    rows = [
        pd.read_parquet(tmp_path / "out" / f"{split}.parquet")["x"].tolist() for split in ("train", "test")
    ]
    assert rows == [list(range(len(names) - 1)), [len(names) - 1]]


def test_a_config_without_parquet_files_is_refused(tmp_path):
    (tmp_path / "main").mkdir()
    benchmark = Benchmark(
        kind="benchmark", source=f"path:{tmp_path}", config="main", sha256=sha256(tmp_path / "main")
    )
    with pytest.raises(Refusal, match="has no parquet files in main"):
        benchmark.write(tmp_path)

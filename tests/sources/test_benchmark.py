"""Benchmarks: every layout of the hub gives one file per split; files and folders in the wrong place."""

import pandas as pd
import pytest
import torch

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources.benchmark import Benchmark
from stages.sources.gguf import Gguf
from stages.sources.safetensors import Safetensors


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


def test_a_file_in_place_of_the_configs_folder_is_refused(tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "test.parquet")
    hashed = sha256(tmp_path / "test.parquet")
    for source, config in ((tmp_path, "test.parquet"), (tmp_path / "test.parquet", ".")):
        benchmark = Benchmark(kind="benchmark", source=f"path:{source}", config=config, sha256=hashed)
        with pytest.raises(Refusal, match=r"test.parquet is a file; name the folder of its parquet files"):
            benchmark.write(tmp_path)


@pytest.mark.parametrize("config", ["main", ["main", "other"]])
def test_an_empty_mirror_is_refused(config, tmp_path):
    mirror = tmp_path / "mirror"
    for name in ("main", "other"):
        (mirror / name).mkdir(parents=True)
    hashed = sha256(mirror / "main" if config == "main" else mirror)
    several = config if config == "main" else tuple(config)
    benchmark = Benchmark(kind="benchmark", source=f"path:{mirror}", config=several, sha256=hashed)
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal, match="has no parquet files in main"):
        benchmark.write(tmp_path / "out")


def test_a_folder_in_place_of_nltks_zip_is_refused(tmp_path):
    (tmp_path / "main").mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "main" / "test.parquet")
    hashed = sha256(tmp_path / "main")
    benchmark = Benchmark.model_validate(
        {
            "kind": "benchmark", "source": f"path:{tmp_path}", "config": "main", "sha256": hashed,
            "nltk_data": {"source": f"path:{tmp_path}", "file": "main", "sha256": hashed},
        }
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal, match=r"nltk_data, path:\S+ main, cannot be loaded \(IsADirectoryError"):
        benchmark.write(tmp_path / "out")


def test_a_file_in_place_of_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    hashed = sha256(tmp_path / "model.safetensors")
    source = f"path:{tmp_path / 'model.safetensors'}"
    model = Safetensors(source=source, format="safetensors", sha256=hashed, in_features=(32,))
    with pytest.raises(Refusal, match=r"model.safetensors is a file; name the folder of the checkpoint"):
        model.write(tmp_path, torch.float32)


def test_a_folder_in_place_of_a_gguf_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    hashed = sha256(tmp_path / "folder")
    model = Gguf(source=f"path:{tmp_path}", format="gguf", file="folder", sha256=hashed, in_features=(32,))
    with pytest.raises(Refusal, match=r"folder is a folder; name the .gguf file"):
        model.write(tmp_path, torch.float32)

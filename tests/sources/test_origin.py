"""Sources: pinned, hashed, never executed; from a package, a folder and a server like the hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.core.errors import Refusal
from stages.sources import gguf as gguf_format
from stages.sources.benchmark import Benchmark
from stages.sources.origin import fetched, sha256
from tests import hub, project
from tests.pipeline import params

ZEROS = "0" * 64
ONE = hashlib.sha256(b"one").hexdigest()


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel written by hand."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text)}")
    made = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": "\n".join([*lines, f"{info}/RECORD,,"])}).items():
            archive.writestr(path, text)
    return made


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_a_file_of_a_package(index):
    wheel(
        index,
        "prose",
        "1.0",
        {"prose/data.txt": "one", "prose/more/x.txt": "two", "prose/__init__.py": "1/0"},
    )
    with fetched("pypi:prose==1.0", "prose/data.txt", ONE) as path:
        assert path.read_text() == "one"
        gone = path
    assert not gone.exists()
    with fetched("pypi:prose==1.0", "prose/more", None) as path:
        assert [file.name for file in path.iterdir()] == ["x.txt"]
    with fetched("pypi:prose==1.0", "", None) as path:
        assert {file.name for file in path.iterdir()} == {"prose", "prose-1.0.dist-info"}


@pytest.mark.parametrize(
    "source, file, reason",
    [
        ("pypi:prose==1.0", "prose/data.txt", f"its sha256 is {ONE}, params.yaml says {ZEROS}"),
        ("pypi:prose==1.0", "prose/other.txt", r"pypi:prose==1\.0 has no prose/other\.txt"),
        ("pypi:prose==2.0", "x", r"could not download a wheel of prose==2\.0"),
    ],
    ids=["another hash", "no such file", "no such version"],
)
def test_what_is_not_as_params_say_is_refused(index, source, file, reason):
    wheel(index, "prose", "1.0", {"prose/data.txt": "one"})
    with pytest.raises(Refusal, match=reason), fetched(source, file, ZEROS):
        raise AssertionError


def test_a_source_distribution_is_never_built(index, tmp_path):
    source = tmp_path / "prose-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: prose\nVersion: 1.0\n")
    import tarfile

    with tarfile.open(index / "prose-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "prose-1.0")
    with pytest.raises(Refusal, match="could not download a wheel"), fetched("pypi:prose==1.0", "x", ZEROS):
        raise AssertionError
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_hashed_whole(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "deep" / "b").write_text("2")
    before = sha256(folder)
    with fetched(f"path:{folder}", "", before) as path:
        assert path == folder
    (folder / "deep" / "b").write_text("3")
    assert sha256(folder) != before
    (folder / "deep" / "b").write_text("2")
    (folder / "deep" / "b").rename(folder / "b")
    assert sha256(folder) != before


@pytest.mark.parametrize("name", ["base/tiny", "datasets/news"])
def test_a_changed_folder_is_refused_and_nothing_is_left(name, workspace):
    chosen = params("llama", {})
    kind, key = name.split("/")
    if kind == "base":
        with pytest.raises(Refusal, match="its sha256 is"):
            chosen.models[key].model_copy(update={"sha256": ZEROS}).download(key, chosen.run)
    else:
        with pytest.raises(Refusal, match="its sha256 is"):
            chosen.datasets[key].model_copy(update={"sha256": ZEROS}).download(key)
    assert not list(Path("data").rglob(f"{key}/*"))


def test_other_widths_than_declared_are_refused(workspace):
    chosen = params("llama", {})
    wrong = chosen.models["tiny"].model_copy(update={"in_features": (32, 128)})
    with pytest.raises(Refusal, match=r"models\.tiny\.in_features is \[32, 128\], the model has \[32, 64\]"):
        wrong.download("tiny", chosen.run)
    assert not Path("data/models/base/tiny").exists()


# The hub. Its address is read when the library is imported, so the download runs in a process of its own.
def over_hub(folder: Path, address: str, raw: dict, name: str) -> subprocess.CompletedProcess[str]:
    project.write(folder, raw)
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")} | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(project.ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "stages.download", name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def repository(inputs: Path) -> dict[str, bytes]:
    """A tiny checkpoint as the hub would hold it, and what must never be fetched beside it."""
    files = {file.name: file.read_bytes() for file in (inputs / "llama").iterdir()}
    return files | {
        "pytorch_model.bin": b"pickle", "modeling_x.py": b"1/0", "model.gguf": b"x", "README.md": b"x",
        "onnx/model.onnx": b"x",
    }  # fmt: skip


def hub_params(workspace: Path) -> dict:
    raw = project.params(Path("inputs"))
    raw["models"]["tiny"] = {
        "source": f"hub:org/tiny@{hub.COMMIT}", "format": "safetensors", "in_features": [32, 64],
    }  # fmt: skip
    raw["datasets"]["sums"] = {"kind": "benchmark", "source": f"hub:org/sums@{hub.COMMIT}", "config": "main"}
    raw["datasets"]["prose"] = {
        "kind": "text", "source": f"hub:org/sums@{hub.COMMIT}", "file": "prose.txt", "documents": "lines",
        "calibration": 0.5, "sha256": hashlib.sha256(b"a b\nc d\n").hexdigest(),
    }  # fmt: skip
    return raw


def test_a_model_from_the_hub(workspace, inputs):
    with hub.serving({"models/org/tiny": repository(inputs)}) as (address, log):
        done = over_hub(workspace, address, hub_params(workspace), "base/tiny")
    assert done.returncode == 0, done.stderr
    made = AutoModelForCausalLM.from_pretrained("data/models/base/tiny")
    given = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), given.parameters(), strict=True))
    told = json.loads(Path("data/models/base/tiny/artifact.json").read_text())
    assert told["base"]["source"] == f"hub:org/tiny@{hub.COMMIT}"
    assert any(line.endswith("model.safetensors") for line in log)
    fetched_files = {line.rsplit("/", 1)[1] for line in log if "/resolve/" in line}
    assert not {name for name in fetched_files if name.endswith((".py", ".bin", ".gguf", ".onnx", ".md"))}


def test_a_model_of_pickles_alone_is_refused(workspace, inputs):
    files = {
        name: content for name, content in repository(inputs).items() if not name.endswith(".safetensors")
    }
    with hub.serving({"models/org/tiny": files}) as (address, log):
        done = over_hub(workspace, address, hub_params(workspace), "base/tiny")
    assert done.returncode == 2
    assert "has no safetensors; checkpoints in pickle formats are not read." in done.stderr
    assert "Traceback" not in done.stderr
    assert not [line for line in log if line.endswith(".bin")]


def test_a_model_with_code_of_its_own_is_refused(workspace, inputs):
    files = repository(inputs)
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    with hub.serving({"models/org/tiny": files | {"config.json": json.dumps(config).encode()}}) as (
        address,
        log,
    ):
        done = over_hub(workspace, address, hub_params(workspace), "base/tiny")
    assert done.returncode == 2
    assert "wants its own code to be run (auto_map); that is never done." in done.stderr
    assert not [line for line in log if line.endswith(".py")]


def test_a_repository_that_is_not_there_is_refused(workspace):
    with hub.serving({}) as (address, _):
        done = over_hub(workspace, address, hub_params(workspace), "base/tiny")
    assert done.returncode == 2
    assert f"the hub did not give org/tiny at {hub.COMMIT}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["sums", "prose"])
def test_a_data_set_from_the_hub(name, workspace, tmp_path):
    frame = pd.DataFrame({"question": [f"q{i}" for i in range(4)], "answer": list("abcd")})
    parts = {}
    for number, half in enumerate((frame[:2], frame[2:])):
        half.to_parquet(tmp_path / "part.parquet")
        parts[f"main/train-0000{number}-of-00002.parquet"] = (tmp_path / "part.parquet").read_bytes()
    files = parts | {
        "main/test-00000-of-00001.parquet": parts["main/train-00000-of-00002.parquet"],
        "other/test-00000-of-00001.parquet": b"x", "sums.py": b"1/0", "prose.txt": b"a b\nc d\n",
    }  # fmt: skip
    with hub.serving({"datasets/org/sums": files}) as (address, log):
        done = over_hub(workspace, address, hub_params(workspace), f"datasets/{name}")
    assert done.returncode == 0, done.stderr
    made = {file.stem: pd.read_parquet(file) for file in Path(f"data/datasets/{name}").glob("*.parquet")}
    if name == "sums":
        assert {split: len(rows) for split, rows in made.items()} == {"train": 4, "test": 2}
        assert made["train"]["question"].tolist() == frame["question"].tolist()
    else:
        assert {split: rows["text"].tolist() for split, rows in made.items()} == {
            "calibration": ["a b"], "evaluation": ["c d"],
        }  # fmt: skip
    assert not [line for line in log if line.endswith(".py") or "/other/" in line]


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "test.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"],
        ["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
    ],
)
def test_every_layout_the_hub_has_is_read(names, tmp_path):
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


def test_a_config_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "main").mkdir()
    benchmark = Benchmark(
        kind="benchmark", source=f"path:{tmp_path}", config="main", sha256=sha256(tmp_path / "main")
    )
    with pytest.raises(Refusal, match="has no parquet in main"):
        benchmark.write(tmp_path)


def test_the_grid_of_a_gguf_file_is_counted(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    for name in ("a", "b"):
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor(
        "c",
        gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.add_tensor("norm", np.ones(64, dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert gguf_format.grid(tmp_path / "m.gguf") == {
        "format": "Q4_1",
        "group_size": 32,
        "tensors": {"F32": 1, "Q4_1": 2, "Q8_0": 1},
        "weights": {"F32": 64, "Q4_1": 512, "Q8_0": 256},
    }


def test_a_gguf_file_of_floats_lies_on_no_grid(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", np.ones((2, 32), dtype=np.float16))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert gguf_format.grid(tmp_path / "m.gguf") is None

"""Sources: pinned, hashed and never executed; from a package, a folder and a server like the hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.code import code
from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.job.pieces import identified
from stages.job.transient import passing
from stages.sources import origin
from stages.sources.origin import assembled, fetched
from tests import hub, project

ZEROS = "0" * 64
SHA256 = hashlib.sha256(b"one").hexdigest()


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """Write a wheel without building it."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text)}")
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": "\n".join([*lines, f"{info}/RECORD,,"])}).items():
            archive.writestr(path, text)
    return file


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Let pip see the wheels of one folder only, and return it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def fetch(source: str) -> None:
    with fetched(source, "x", None):
        pass


def test_a_file_or_folder_is_taken_out_of_a_package(index):
    wheel(
        index,
        "prose",
        "1.0",
        {"prose/data.txt": "one", "prose/more/x.txt": "two", "prose/__init__.py": "1/0"},
    )
    with fetched("pypi:prose==1.0", "prose/data.txt", SHA256) as path:
        assert path.read_text() == "one"
    assert not path.exists()
    with fetched("pypi:prose==1.0", "prose/more", None) as path:
        assert [file.name for file in path.iterdir()] == ["x.txt"]
    with fetched("pypi:prose==1.0", "", None) as path:
        assert {file.name for file in path.iterdir()} == {"prose", "prose-1.0.dist-info"}


def test_an_index_that_does_not_answer_may_answer_later(index, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the port of nobody
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(Refusal, match=r"No matching distribution .* after connection broken by") as refusal:
        fetch("pypi:prose==2.0")
    assert passing(refusal.value) == "network"


def test_a_package_that_is_not_there_stays_away(index):
    with pytest.raises(Refusal, match=r"cannot download a wheel of prose==2\.0") as refusal:
        fetch("pypi:prose==2.0")
    assert passing(refusal.value) is None


@pytest.mark.parametrize("words, cause", [("[SSL: CERTIFICATE_VERIFY_FAILED]", None), ("EOF", "network")])
def test_a_certificate_is_not_waited_for(words, cause, monkeypatch):
    stderr = f"WARNING: Retrying after connection broken by 'SSLError({words})': /simple\nERROR: No matching"
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(origin.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(Refusal) as refusal:
        fetch("pypi:prose==2.0")
    assert passing(refusal.value) == cause


@pytest.mark.parametrize(
    "source, file, reason",
    [
        ("pypi:prose==1.0", "prose/data.txt", f"its sha256 is {SHA256}, but params.yaml has {ZEROS}"),
        ("pypi:prose==1.0", "prose/other.txt", r"pypi:prose==1\.0 has no prose/other\.txt"),
        ("pypi:prose==2.0", "x", r"cannot download a wheel of prose==2\.0"),
    ],
    ids=["another hash", "no such file", "no such version"],
)
def test_a_package_that_differs_from_params_is_refused(index, source, file, reason):
    wheel(index, "prose", "1.0", {"prose/data.txt": "one"})
    with pytest.raises(Refusal, match=reason), fetched(source, file, ZEROS):
        raise AssertionError


def test_a_damaged_package_is_refused(index):
    file = wheel(index, "prose", "1.0", {"prose/data.txt": "one " * 99})
    content = file.read_bytes()
    at = content.index(b"one one")
    file.write_bytes(content[:at] + b"two" + content[at + 3 :])
    with (
        pytest.raises(Refusal, match=r"the wheel of prose==1\.0 cannot be loaded .*CRC"),
        fetched("pypi:prose==1.0", "prose/data.txt", ZEROS),
    ):
        raise AssertionError


def parts(index: Path, *contents: str) -> list[tuple[str, str]]:
    """Write a package for each part of a file."""
    for number, content in enumerate(contents):
        wheel(index, f"part{number}", "1.0", {f"part{number}/data/m.part0{number}": content})
    return [(f"pypi:part{n}==1.0", f"part{n}/data/m.part0{n}") for n in range(len(contents))]


def test_a_file_in_parts_is_joined_in_the_order_given(index):
    pieces = parts(index, "one", "two", "three")
    with assembled(pieces, hashlib.sha256(b"onetwothree").hexdigest()) as path:
        assert path.read_bytes() == b"onetwothree"
    assert not path.exists()
    with assembled(pieces[::-1], hashlib.sha256(b"threetwoone").hexdigest()) as path:
        assert path.read_bytes() == b"threetwoone"


@pytest.mark.parametrize(
    ("order", "second", "message"),
    [
        ((1, 0), "m.part01", r"part1==1\.0 \+ pypi:part0==1\.0: its sha256 is [0-9a-f]{64}, but"),
        ((0, 1), "other", r"pypi:part1==1\.0 has no part1/data/other; correct the path"),
        ((0, 1), "", r"pypi:part1==1\.0 part1/data/ is no file; correct the path"),
    ],
)
def test_parts_that_differ_from_params_are_refused(order, second, message, index):
    pieces = parts(index, "one", "two")
    pieces[1] = (pieces[1][0], f"part1/data/{second}")
    whole = hashlib.sha256(b"onetwo").hexdigest()
    with pytest.raises(Refusal, match=message), assembled([pieces[place] for place in order], whole):
        pass


def test_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "outside").write_text("1")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "b").symlink_to("a")
    with fetched(f"path:{folder}", "", sha256(folder)) as path:
        assert path == folder
    (folder / "c").symlink_to("../outside")
    with (
        pytest.raises(Refusal, match=r"c is a link out of this folder; copy .* \(cp -rL\)"),
        fetched(f"path:{folder}", "", sha256(folder)),
    ):
        raise AssertionError


def test_a_source_distribution_is_never_built(index, tmp_path):
    source = tmp_path / "prose-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: prose\nVersion: 1.0\n")
    with tarfile.open(index / "prose-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "prose-1.0")
    with pytest.raises(Refusal, match="cannot download a wheel"), fetched("pypi:prose==1.0", "x", ZEROS):
        raise AssertionError
    assert not (tmp_path / "ran").exists()


def test_the_hash_of_a_folder_covers_names_and_contents(tmp_path):
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


LEFT_BY_TOOLS = [
    ".cache/huggingface/download/a.lock",
    ".git/HEAD",
    ".DS_Store",
    "deep/.DS_Store",
    "Thumbs.db",
]


@pytest.mark.parametrize("name", LEFT_BY_TOOLS)
def test_what_tools_leave_in_a_folder_is_no_part_of_its_hash(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_text("1")
    before = sha256(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to("/etc/hostname")
    with fetched(f"path:{folder}", "", before) as path:
        assert path == folder
    (folder / ".gitattributes").write_text("1")
    assert sha256(folder) != before


def over_hub(folder: Path, address: str, raw: dict, name: str) -> subprocess.CompletedProcess[str]:
    """Download in a process of its own, as the library reads the hub's address on import."""
    project.write(folder, raw)
    code(names for names in identified() if names[0] == "download")
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")} | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **project.importing(project.ROOT),
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
    """Return the files of a tiny checkpoint on the hub, and some that must never be fetched."""
    files = {file.name: file.read_bytes() for file in (inputs / "llama").iterdir()}
    return files | {
        "pytorch_model.bin": b"pickle", "modeling_x.py": b"1/0", "model.gguf": b"x", "README.md": b"x",
        "onnx/model.onnx": b"x",
    }  # fmt: skip


ROWS = {"rows/a.jsonl": b'{"text": "a b"}\n', "rows/b.jsonl": b'{"text": "c d"}\n'}
"""A folder of text on the hub."""


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
    Path("rows").mkdir()
    for file, content in ROWS.items():
        Path(file).write_bytes(content)
    raw["datasets"]["rows"] = {
        **raw["datasets"]["prose"], "file": "rows", "documents": "jsonl", "sha256": sha256(Path("rows")),
    }  # fmt: skip
    return raw


def test_a_model_from_the_hub(workspace, inputs):
    with hub.serving({"models/org/tiny": repository(inputs)}) as (address, log):
        done = over_hub(workspace, address, hub_params(workspace), "base/tiny")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained("data/models/base/tiny")
    original = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    facts = json.loads(Path("data/models/base/tiny/artifact.json").read_text())
    assert facts["base"]["source"] == f"hub:org/tiny@{hub.COMMIT}"
    assert any(line.endswith("model.safetensors") for line in log)
    requested = {line.rsplit("/", 1)[1] for line in log if "/resolve/" in line}
    assert not {name for name in requested if name.endswith((".py", ".bin", ".gguf", ".onnx", ".md"))}


def test_a_model_in_pickles_only_is_refused(workspace, inputs):
    files = {
        name: content for name, content in repository(inputs).items() if not name.endswith(".safetensors")
    }
    with hub.serving({"models/org/tiny": files}) as (address, log):
        done = over_hub(workspace, address, hub_params(workspace), "base/tiny")
    assert done.returncode == 2
    assert "has no safetensors, and pickle formats are never loaded" in done.stderr
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
    assert "needs code of its own (auto_map), which is never run" in done.stderr
    assert not [line for line in log if line.endswith(".py")]


def test_a_missing_repository_is_refused(workspace):
    with hub.serving({}) as (address, _):
        done = over_hub(workspace, address, hub_params(workspace), "base/tiny")
    assert done.returncode == 2
    assert f"cannot download org/tiny at {hub.COMMIT} from the hub" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["sums", "prose", "rows"])
def test_a_data_set_from_the_hub(name, workspace, tmp_path):
    frame = pd.DataFrame({"question": [f"q{i}" for i in range(4)], "answer": list("abcd")})
    parts = {}
    for number, half in enumerate((frame[:2], frame[2:])):
        half.to_parquet(tmp_path / "part.parquet")
        parts[f"main/train-0000{number}-of-00002.parquet"] = (tmp_path / "part.parquet").read_bytes()
    files = parts | {
        "main/test-00000-of-00001.parquet": parts["main/train-00000-of-00002.parquet"],
        "other/test-00000-of-00001.parquet": b"x", "sums.py": b"1/0", "prose.txt": b"a b\nc d\n",
        **ROWS,
    }  # fmt: skip
    with hub.serving({"datasets/org/sums": files}) as (address, log):
        done = over_hub(workspace, address, hub_params(workspace), f"datasets/{name}")
    assert done.returncode == 0, done.stderr
    splits = {file.stem: pd.read_parquet(file) for file in Path(f"data/datasets/{name}").glob("*.parquet")}
    if name == "sums":
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "test": 2}
        assert splits["train"]["question"].tolist() == frame["question"].tolist()
    else:
        assert {split: rows["text"].tolist() for split, rows in splits.items()} == {
            "calibration": ["a b"], "evaluation": ["c d"],
        }  # fmt: skip
    assert not [line for line in log if line.endswith(".py") or "/other/" in line]

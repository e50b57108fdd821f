"""Finished blocks: damaged ones are compressed again, unreadable ones stay."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.core.errors import Refusal
from stages.model import shards
from tests.pipeline import TEXT
from tests.recipes import WANDA
from tests.streaming import counted, execute, files, killed_after_a_block, leftovers


def fact_changed(content: bytes) -> bytes:
    facts = json.loads(content)
    facts["sizes"] = {name: value + 1 for name, value in facts["sizes"].items()}
    return json.dumps(facts).encode()


DAMAGE: dict[tuple[str, str], Callable[[bytes], bytes | None]] = {
    ("safetensors", "missing"): lambda content: None,
    ("safetensors", "empty"): lambda content: b"",
    ("safetensors", "cut"): lambda content: content[:-1],
    ("safetensors", "zeroed"): lambda content: content[:-40] + bytes(40),
    ("json", "empty"): lambda content: b"",
    ("json", "cut"): lambda content: content.rstrip()[:-1],
    ("json", "binary"): lambda content: b"\xff\xfe",
    ("json", "other"): lambda content: b"{}",
    ("json", "null"): lambda content: b"null",
    ("json", "list"): lambda content: b"[]",
    ("json", "changed"): fact_changed,
}


@pytest.mark.parametrize(
    ("sequential", "suffix", "how"),
    [
        *(("linear", *damage) for damage in DAMAGE),
        *(("none", *damage) for damage in DAMAGE if damage[1] in ("cut", "changed")),
    ],
)
def test_a_damaged_block_is_compressed_again(sequential, suffix, how, workspace, monkeypatch, caplog):
    recipe = WANDA | {"calibration": TEXT | {"sequential": sequential}}
    expected = files(execute(recipe))
    killed_after_a_block(monkeypatch, recipe)
    (file,) = Path("data/scratch/resume").rglob(f"*.{suffix}")
    content = DAMAGE[suffix, how](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    compressed = counted(monkeypatch)
    with caplog.at_level("WARNING"):
        assert files(execute(recipe)) == expected
    assert len(compressed) == 14
    assert "00000.safetensors or its JSON is damaged; the block is compressed again" in caplog.text
    assert leftovers() == []


def test_a_finished_block_that_cannot_be_read_now_stays(workspace, monkeypatch):
    expected = files(execute(WANDA))
    killed_after_a_block(monkeypatch, WANDA)
    before = sorted(leftovers())

    def fail(_: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with (
        monkeypatch.context() as patch,
        pytest.raises(Refusal, match=r"cannot be read .*Too many .* delete the folder"),
    ):
        patch.setattr(shards, "checksum", fail)
        execute(WANDA)
    assert sorted(leftovers()) == before
    compressed = counted(monkeypatch)
    assert files(execute(WANDA)) == expected
    assert len(compressed) == 7

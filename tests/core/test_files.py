"""Writes that happen whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from stages.core import files


def test_a_folder_replaces_its_target_or_vanishes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = Path("data/models/base/x")
    with files.writing(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(KeyError), files.writing(target) as folder:
        (folder / "b").write_text("2")
        raise KeyError
    assert [file.name for file in target.iterdir()] == ["a"]
    assert not list((files.SCRATCH / "partial").iterdir())


def test_a_file_replaces_its_target_or_vanishes(tmp_path):
    target = tmp_path / "deep" / "x.txt"
    files.write_text(target, "one")
    with pytest.raises(KeyError), files.replacing(target) as partial:
        partial.write_text("half")
        raise KeyError
    assert target.read_text() == "one"
    assert list(target.parent.iterdir()) == [target]
    files.write_json(target, {"b": 1, "a": [2]})
    assert files.read_json(target) == {"b": 1, "a": [2]}


def test_files_have_the_permissions_of_any_new_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files.writing(Path("data/x")) as folder:
        (folder / "private").touch(mode=0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "data/x/private").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_hash_of_a_folder_is_of_names_and_contents(tmp_path):
    for name, text in (("a/x", "1"), ("b", "2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = files.sha256(tmp_path)
    assert before == files.sha256(tmp_path) != files.sha256(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "c")
    assert files.sha256(tmp_path) != before


@pytest.mark.parametrize("parts", [[], [0], [3], [8], [5, 3], [4, 4, 4], [1, 0, 20, 2]])
def test_a_checksum_is_that_of_the_content_however_it_is_cut(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 4)
    content = bytes(range(sum(parts)))
    (tmp_path / "x").write_bytes(content)
    ends = [sum(parts[: number + 1]) for number in range(len(parts))]
    cut = [memoryview(content)[end - part : end] for part, end in zip(parts, ends, strict=True)]
    expected = files.checksum(tmp_path / "x")
    assert files.checksum_of(cut) == expected
    for changed in (content + b"\0", content[:-1], content[::-1], bytes(len(content))):
        (tmp_path / "x").write_bytes(changed)
        assert (files.checksum(tmp_path / "x") == expected) == (changed == content)


def test_json_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(path, text, **options):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(tmp_path / "made.json", {})
    assert not list(tmp_path.iterdir())

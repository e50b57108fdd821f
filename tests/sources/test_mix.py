"""A mix: parts in shares, nothing held out that any part is learned from, and its record names no machine."""

import json
from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.corpus.windows import Calibration, TextPart, calibration_windows, read_parts
from stages.sources.mix import Mix
from tests import families, project

TOKENIZER = families.tokenizer()


def part(folder: Path, name: str, text: str, **options) -> dict:
    (folder / name).write_text(text)
    settings = {"share": 0.5, "documents": "lines", "calibration": 0.5} | options
    return {"source": f"path:{folder}", "file": name, "sha256": sha256(folder / name), **settings}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"news": project.text(1), "code": project.text(2)}
    shares = {"news": 0.7, "code": 0.3}
    return {name: part(tmp_path, f"{name}.txt", text, share=shares[name]) for name, text in texts.items()}


def download(parts: dict) -> Path:
    Mix(kind="mix", parts=parts).download("blend")
    return Path("data/datasets/blend")


def wanted(**options) -> Calibration:
    return Calibration(**{"dataset": "blend", "num_samples": 10, "sequence_length": 16, **options})


def test_each_part_gives_its_share_of_the_windows(parts):
    folder = download(parts)
    (news, more, texts), (code, less, others) = read_parts("blend", "calibration")
    assert (news, more, code, less) == ("news", 0.7, "code", 0.3)
    rows = calibration_windows(TOKENIZER, wanted(), families.VOCAB)
    decoded = TOKENIZER.batch_decode(rows)
    assert len(rows) == 10
    first, second = "\n\n".join(texts), "\n\n".join(others)
    assert [text in first for text in decoded] == [True] * 7 + [False] * 3
    assert [text in second for text in decoded] == [False] * 7 + [True] * 3
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["source"] == f"0.7 path:{Path.cwd().name} news.txt + 0.3 path:{Path.cwd().name} code.txt"
    assert facts["split"]["news"]["calibration"] == len(texts)
    assert str(Path.cwd()) not in (folder / "dataset.json").read_text()


def test_the_seed_draws_from_every_part(parts):
    download(parts)
    drawn = [calibration_windows(TOKENIZER, wanted(seed=seed), families.VOCAB) for seed in (1, 1, 2)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0][:7].equal(drawn[2][:7]) and not drawn[0][7:].equal(drawn[2][7:])


def test_equal_parts_give_equal_bytes(parts):
    folder = download(parts)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    download(parts)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_one_part_teaches_is_held_out_of_no_other(tmp_path, parts):
    shared = project.text(1).splitlines()[0]
    lines = project.text(2).splitlines()
    parts["code"] = part(tmp_path, "code.txt", "\n".join([*lines, shared]), share=0.3)
    folder = download(parts)
    held_out = pd.read_parquet(folder / "evaluation.parquet")["text"].tolist()
    assert shared in pd.read_parquet(folder / "calibration.parquet")["text"].tolist()
    assert shared not in held_out and lines[-1] in held_out


def test_a_part_with_too_few_windows_is_named(parts):
    download(parts)
    with pytest.raises(
        Refusal, match=r"data set blend, part news, has .* fewer than 7000; lower num_samples"
    ):
        calibration_windows(TOKENIZER, wanted(num_samples=10_000), families.VOCAB)


def test_windows_of_two_parts_are_distinct(parts, monkeypatch):
    same = [TextPart("a", 0.5, [project.text(1)]), TextPart("b", 0.5, [project.text(1)])]
    monkeypatch.setattr("stages.corpus.windows.read_parts", lambda *_: same)
    with pytest.raises(Refusal, match="part b, has 0 distinct windows"):
        calibration_windows(TOKENIZER, wanted(), families.VOCAB)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"share": 0.5}, "the shares of news, code make 0.8; let them make 1"),
        ({"calibration": 0.0}, "news has calibration 0, so nothing of it may be learned from"),
        ({"sha256": None}, "two parts are the same file; name each file once"),
    ],
)
def test_parts_that_make_no_mix_are_refused(change, sentence, parts):
    changed = {
        key: value or parts["code"]["sha256"] if key == "sha256" else value for key, value in change.items()
    }
    parts["news"] |= changed
    with pytest.raises(ValidationError, match=sentence):
        Mix(kind="mix", parts=parts)

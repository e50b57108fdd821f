"""The two splits of a text: disjoint however it is cut into documents."""

import re
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources.text import Text, split_calibration, split_documents

WORDS = st.sampled_from(["a", "b", "c", "d"])
DOCUMENTS = st.lists(st.lists(WORDS, min_size=1, max_size=40).map(" ".join), max_size=25).map(
    lambda documents: list(dict.fromkeys(documents))
)
OVERLAP = 13


def slow_runs(documents: list[str]) -> set[str]:
    words = re.findall(r"\w+", " ".join(documents).lower())
    return {" ".join(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)}


@given(DOCUMENTS, st.floats(0, 0.99))
def test_no_document_and_no_run_of_13_words_is_shared(documents, share):
    calibration, evaluation, dropped = split_calibration(documents, share)
    assert len(calibration) + len(evaluation) + dropped == len(documents)
    assert calibration == documents[: len(calibration)]
    assert [d for d in documents[len(calibration) :] if d in evaluation] == evaluation
    assert not set(calibration) & set(evaluation)
    assert not slow_runs(calibration) & slow_runs(evaluation)
    total = sum(map(len, documents))
    assert sum(map(len, calibration)) <= share * total
    rest = documents[len(calibration) :]
    if rest:
        assert sum(map(len, calibration)) + len(rest[0]) > share * total


def words(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


def test_thirteen_shared_words_drop_a_document_and_twelve_do_not():
    documents = [words(0, 40), f"x {words(5, 13)} y", f"x {words(5, 12)} y"]
    assert split_calibration(documents, 0.7) == ([documents[0]], [documents[2]], 1)


def test_punctuation_and_case_do_not_hide_an_overlap():
    documents = [words(0, 40), words(5, 13).upper().replace(" ", ", ")]
    assert split_calibration(documents, 0.75)[1:] == ([], 1)


def test_an_overlap_across_short_documents_is_seen():
    verses = [words(i * 5, 5) for i in range(4)]
    documents = [*verses, f"x {words(2, 14)} y", "z"]
    assert split_calibration(documents, 0.6) == (verses, ["z"], 1)
    # The other way around: short evaluation documents that together repeat a long one.
    documents = [words(0, 20), words(3, 7), words(10, 7), "z"]
    assert split_calibration(documents, 0.6) == (documents[:1], [words(3, 7), "z"], 1)


def test_a_share_of_zero_keeps_all_for_evaluation():
    assert split_calibration(["a b", "c d"], 0) == ([], ["a b", "c d"], 0)


@pytest.mark.parametrize(
    ("how", "text", "documents"),
    [
        ("lines", "a  b\n\nc\na b\n", ["a b", "c"]),
        ("paragraphs", "a\nb\n \nc\n\n\n\nd\n", ["a b", "c", "d"]),
        ("csv", 'who,text\nx,"a, ""b""\nc"\ny,\nz,NA\n', ['a, "b" c', "NA"]),
    ],
)
def test_documents(how, text, documents):
    assert split_documents(text.encode(), how) == documents


def test_documents_of_a_parquet_are_its_texts(tmp_path):
    frame = pd.DataFrame({"text": ["", " = A = \n", "b  c\n", None, "b c"], "other": range(5)})
    frame.to_parquet(tmp_path / "t.parquet")
    assert split_documents((tmp_path / "t.parquet").read_bytes(), "parquet") == ["= A =", "b c"]


def dataset(folder: Path, text: bytes, **options) -> Text:
    (folder / "t.txt").write_bytes(text)
    settings = {"documents": "lines", "calibration": 0.5} | options
    return Text(
        kind="text", source=f"path:{folder}", file="t.txt", sha256=sha256(folder / "t.txt"), **settings
    )


def test_both_splits_are_written(tmp_path):
    text = "\n".join(words(i * 20, 20) for i in range(10)).encode()
    facts = dataset(tmp_path, text).write(tmp_path)
    splits = {
        name: pd.read_parquet(tmp_path / f"{name}.parquet")["text"].tolist()
        for name in ("calibration", "evaluation")
    }
    assert facts["split"] == {"calibration": 5, "evaluation": 5, "dropped": 0}
    assert splits["calibration"] + splits["evaluation"] == text.decode().splitlines()


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        (b" \n\n", {}, "has no lines with text"),
        (b"\xff\xfe", {}, "is not UTF-8 text"),
        (b"a,b\n1,2\n", {"documents": "csv"}, "has no column text, only a, b"),
        (b"a,b\n1,2\n", {"documents": "parquet"}, "is not parquet"),
    ],
)
def test_a_file_that_is_no_text_is_refused(text, options, sentence, tmp_path):
    with pytest.raises(Refusal, match=sentence):
        dataset(tmp_path, text, **options).write(tmp_path)

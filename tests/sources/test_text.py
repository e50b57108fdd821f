"""The two splits of a text: disjoint however it is cut into documents."""

import re
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources.documents import split_calibration, split_documents
from stages.sources.text import Text

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
        ("csv", '\ntext\n\na "b"\n\n" c"\n', ['a "b"', "c"]),
        ("csv", f"text\n{'a' * 200_000}\nb\n", ["a" * 200_000, "b"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_documents(how, text, documents, end, mark):
    content = (mark + text.replace("\n", end)).encode()
    assert split_documents(content, how, "t.txt") == documents


SEPARATORS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""What `str.splitlines` takes for the end of a line, beside line feeds and carriage returns."""


@pytest.mark.parametrize("how", ["lines", "paragraphs", "csv"])
def test_no_other_character_ends_a_line(how):
    text = "text\n\n" + "\n\n".join(f"a{separator}b{ord(separator)}" for separator in SEPARATORS)
    documents = split_documents(text.encode(), how, "t.txt")
    assert documents[how != "csv" :] == [f"a b{ord(separator)}" for separator in SEPARATORS]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), max_size=9), max_size=9))
def test_lines_are_the_files_lines(lines):
    assume(not any(line.startswith(("\ufeff", "{", "[")) for line in lines))
    expected = dict.fromkeys(" ".join(line.split()) for line in lines)
    documents = split_documents(("\ufeff" + "\n".join(lines)).encode(), "lines", "t.txt")
    assert documents == [line for line in expected if line]


@pytest.mark.parametrize("text", ["one\n\ufefftwo", '{"one\ntwo"', "[one]\ntwo", "[1]\n{}"])
def test_marks_of_joined_files_and_brackets_in_text_are_no_obstacle(text):
    pieces = split_documents(text.encode(), "lines", "t.txt")
    assert pieces == text.replace("\ufeff", "").split("\n")


def test_documents_of_a_parquet_are_its_texts(tmp_path):
    frame = pd.DataFrame({"text": ["", " = A = \n", "b  c\n", None, "b c"], "other": range(5)})
    frame.to_parquet(tmp_path / "t.parquet")
    assert split_documents((tmp_path / "t.parquet").read_bytes(), "parquet", "t") == ["= A =", "b c"]


@pytest.mark.parametrize(
    ("values", "kinds"), [([b"a", b"b"], "bytes"), ([1, 2], "int"), ([["a"], None], "ndarray")]
)
def test_a_parquet_whose_texts_are_no_strings_is_refused(values, kinds, tmp_path):
    pd.DataFrame({"text": values}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(Refusal, match=f"^t.parquet: its column text holds {kinds}; write it as strings"):
        split_documents((tmp_path / "t.parquet").read_bytes(), "parquet", "t.parquet")


def test_documents_of_json_lines_are_a_field_of_each_object():
    text = '{"body": "a\\nb", "text": 1}\r\n\n{"body": null}\n{"body": "c\u2028d"}\n{"body": "a b"}\n'
    assert split_documents(("\ufeff" + text).encode(), "jsonl", "t", "body") == ["a b", "c d"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "t.jsonl: line 2 is not JSON .*; write one whole object a line"),
        ("[1]", "t.jsonl: line 2 is a list, not an object"),
        (
            '{"body": "b"}',
            "line 2 of t.jsonl has no column text, only body; set column to the one of documents",
        ),
        (r'{"text": "b \ud83d c"}', r"t.jsonl: line 2 has \\ud83d, half of a character .*; write both"),
        (r'{"text": "b", "\udc00": [1]}', r"t.jsonl: line 2 has \\udc00, half of a character"),
        ('{"text": ["b"]}', "t.jsonl: in line 2 text is list, not text; write it as a string"),
    ],
)
def test_a_broken_line_of_json_is_named(line, sentence):
    with pytest.raises(Refusal, match=f"^{sentence}"):
        split_documents(f'{{"text": "a"}}\n{line}\n'.encode(), "jsonl", "t.jsonl")


def test_a_character_written_as_two_escapes_is_text():
    assert split_documents(rb'{"text": "a \ud83d\ude00 \\ud83d"}', "jsonl", "t") == ["a \U0001f600 \\ud83d"]


def folder_of(path: Path, documents: str, **files: str) -> Text:
    (path / "texts" / "b").mkdir(parents=True)
    for name, text in files.items():
        (path / "texts" / name.replace("__", "/").replace("_", ".")).write_text(text)
    settings = {"documents": documents, "calibration": 0, "sha256": sha256(path / "texts")}
    return Text(kind="text", source=f"path:{path / 'texts'}", **settings)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    files = {"c_txt": "x y\n\nz", "b__a_txt": "a b\nc", "_gitignore": "no text"}
    assert folder_of(tmp_path, "files", **files).read() == ["a b c", "x y z"]
    by_line = Text(**{**folder_of(tmp_path / "lines", "lines", **files).model_dump(), "documents": "lines"})
    assert by_line.read() == ["a b", "c", "x y", "z"]


def test_a_file_of_another_format_in_a_folder_is_refused(tmp_path):
    text = folder_of(tmp_path, "files", a_txt="a", b_jsonl="{}")
    with pytest.raises(Refusal, match=r"in this folder, b.jsonl ends in .jsonl.*documents: jsonl, or move"):
        text.read()


@pytest.mark.parametrize("how", ["lines", "files", "csv", "parquet", "jsonl"])
def test_an_empty_folder_is_refused(how, tmp_path):
    with pytest.raises(Refusal, match=r"texts has no (lines|files|rows) with text; .*choose another file"):
        folder_of(tmp_path, how).read()


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        ("a.jsonl", {"documents": "lines"}, "a.jsonl ends in .jsonl, .*; write documents: jsonl"),
        ("a.csv", {"documents": "jsonl"}, "write documents: csv"),
        ("a.json", {"documents": "lines"}, "a.json is JSON, not text; write an object a line as .jsonl"),
        ("a.txt", {"documents": "lines", "column": "body"}, "documents: lines has no columns; leave column"),
    ],
)
def test_a_suffix_or_column_that_contradicts_the_format_is_refused(file, options, sentence):
    settings = {"kind": "text", "source": "path:x", "sha256": "0" * 64, "calibration": 0.5}
    with pytest.raises(ValidationError, match=sentence):
        Text(**settings, file=file, **options)


@pytest.mark.parametrize("how", ["csv", "parquet", "jsonl"])
def test_a_column_of_another_name_is_read(how, tmp_path):
    frame = pd.DataFrame({"body": ["a b", "c d"], "text": ["no", "no"]})
    write = {"csv": frame.to_csv, "parquet": frame.to_parquet, "jsonl": frame.to_json}[how]
    write(tmp_path / "t", **({"orient": "records", "lines": True} if how == "jsonl" else {"index": False}))
    assert split_documents((tmp_path / "t").read_bytes(), how, "t", "body") == ["a b", "c d"]


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
        (b"\xef\xbb\xbf", {}, "has no lines with text"),
        (b"\xff\xfe", {}, "is not UTF-8 text at byte 0; save it in that encoding"),
        ("a\nb".encode("utf-16"), {}, "is not UTF-8 text at byte 0"),
        ("a\nb".encode("utf-16-le"), {}, "has NUL characters, as UTF-16 and binary files have"),
        (b"text\na\0b\n", {"documents": "csv"}, "has NUL characters"),
        (b'{"text": "a"}\n{"text": "b"}\n', {}, "is JSON, whose names and brackets would be read as text"),
        (b'\n[\n {"text": "a"},\n {"text": "b"}\n]\n', {"documents": "paragraphs"}, "is JSON"),
        (b"a,b\n1,2\n", {"documents": "csv"}, "has no column text, only a, b"),
        (b"text,who,text\n1,2,3\n", {"documents": "csv"}, "has several columns text"),
        (b"", {"documents": "csv"}, "has no column text, for it is empty"),
        (b"\n\n", {"documents": "csv"}, "has no column text, for it is empty"),
        (b"text\n", {"documents": "csv"}, "has no rows with text"),
        (b'text\n"a\nb\n', {"documents": "csv"}, "no sound csv up to line 3: .*; close every double quote"),
        (b'text\n"a"b\n', {"documents": "csv"}, "no sound csv up to line 2"),
        (b"text\na\nb, c\n", {"documents": "csv"}, "1 fields, the row that ends in line 3 has 2; put texts"),
        (b"text,who\n1,2,3\n4,5,6\n", {"documents": "csv"}, "2 fields, the row that ends in line 2 has 3"),
        (b"who,text\na,b\nc\n", {"documents": "csv"}, "2 fields, the row that ends in line 3 has 1"),
        (b"a,b\n1,2\n", {"documents": "parquet"}, "is not parquet, or damaged"),
        (b"", {"documents": "parquet"}, "is not parquet, or damaged"),
    ],
)
def test_a_file_that_is_no_text_is_refused(text, options, sentence, tmp_path):
    with pytest.raises(Refusal, match=sentence):
        dataset(tmp_path, text, **options).write(tmp_path)


BOOK = "\n\n".join(f"{words(i * 20, 12)}\n{words(i * 20 + 12, 8)}" for i in range(10))


@pytest.mark.parametrize(
    ("text", "how", "advice"),
    [
        (BOOK.replace("\n\n", " ").replace("\n", " "), "lines", "cut it into more lines"),
        (BOOK.replace("\n\n", "\n"), "paragraphs", "set documents to lines, of which it has 20"),
        (words(0, 90) + "\n" + words(90, 9), "lines", "cut it into more lines"),
        (f"text\n{words(0, 90)}\n", "csv", "cut it into more rows"),
    ],
)
def test_a_book_that_is_one_document_is_refused_with_a_way_out(text, how, advice, tmp_path):
    made = dataset(tmp_path, text.encode(), documents=how)
    with pytest.raises(Refusal, match=rf"its first document of \d has \d+ of \d+ characters.*; {advice}, or"):
        made.write(tmp_path)
    assert not list(tmp_path.glob("*.parquet"))
    split = dataset(tmp_path, text.encode(), documents=how, calibration=0).write(tmp_path)["split"]
    assert split["calibration"] == 0 and split["evaluation"] > 0


def test_a_text_that_repeats_its_calibration_part_is_refused(tmp_path):
    text = f"{words(0, 40)}\nx {words(5, 20)}\ny {words(9, 20)}".encode()
    with pytest.raises(
        Refusal, match="each of the 2 documents after the calibration part shares a run of 13"
    ):
        dataset(tmp_path, text).write(tmp_path)

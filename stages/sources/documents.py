"""Running text in documents, split into a calibration and an evaluation part that have nothing in common.

The first documents are for calibration, the rest for evaluation. An evaluation document that shares a run of
13 words with the calibration part is dropped (the overlap test of the GPT-3 paper, 2005.14165), as a method
looks better than it is when it is evaluated on its own calibration text.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.core.errors import Refusal
from stages.core.files import contents
from stages.core.lazy import pd
from stages.core.schema import Sha256
from stages.sources.dataset import Dataset
from stages.sources.origin import InnerPath, Origin, fetched

_OVERLAP = 13
"""Words of a run that marks an overlap."""
_PIECES = {
    "lines": "lines", "paragraphs": "paragraphs", "files": "files", "csv": "rows", "parquet": "rows",
    "jsonl": "rows",
}  # fmt: skip
"""What documents are in each format."""
_TABLES = ("csv", "parquet", "jsonl")
"""The formats whose text is in a column."""
_HALF = re.compile("[\\ud800-\\udfff]")
"""Half of a character that JSON writes as two escapes, such as an emoji; alone it is no text."""
TABLE_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""The suffixes of tables, and the `documents` that reads each."""


class LongDocument(Refusal):
    """The first document has more of a text than the share for calibration, which would be empty."""


class Documents(Dataset):
    """A text file, or a folder of them, inside a source: a text alone, or a part of a mix."""

    kind: Literal["text"]
    source: Origin
    file: InnerPath = ""
    """The file, or a folder whose files are all read in the order of their paths, but not those whose name
    begins with a dot; "" is the whole source."""
    sha256: Sha256
    documents: Literal["lines", "paragraphs", "files", "csv", "parquet", "jsonl"]
    """A document is a line, a paragraph between blank lines, a whole file, or the text of a row: of csv, of
    parquet, or of JSON Lines, an object a line."""
    column: Annotated[str | None, Field(min_length=1, exclude_if=lambda name: name is None)] = None
    """The column of a row's text; null is `text`."""
    calibration: Annotated[float, Field(ge=0, lt=1)]
    """Share of the characters for calibration or training; the rest is for evaluation."""

    @model_validator(mode="after")
    def _as_named(self) -> Self:
        if self.column is not None and self.documents not in _TABLES:
            raise ValueError(
                f"documents: {self.documents} has no columns; leave column out, or set documents to "
                f"{', '.join(_TABLES[:-1])} or {_TABLES[-1]}"
            )
        if mistake := _contradiction(self.file or self.source.partition(":")[2], self.documents):
            raise ValueError(mistake)
        return self

    @property
    def name(self) -> str:
        """The file as messages name it."""
        return f"{self.source} {self.file}".rstrip()

    def read(self) -> list[str]:
        """Return all documents, in order.

        Raises:
            Refusal: the file cannot be fetched or cut into documents, or has none.
        """
        with fetched(self.source, self.file, self.sha256, data=True) as path:
            documents = self._cut(path, self.documents)
        if not documents:
            raise Refusal(
                f"{self.name} has no {_PIECES[self.documents]} with text; set documents to the file's "
                "format, or choose another file."
            )
        return documents

    def split(self) -> tuple[list[str], list[str], int]:
        """Return (calibration, evaluation, number of evaluation documents dropped for an overlap).

        Raises:
            Refusal: the file cannot be cut into documents, or leaves one of the two parts empty; for the
                first part it is a `LongDocument`.
        """
        documents = self.read()
        calibration, evaluation, dropped = split_calibration(documents, self.calibration)
        if self.calibration and not calibration:
            raise LongDocument(
                f"{self.name}: its first document of {len(documents)} has {len(documents[0])} of "
                f"{sum(map(len, documents))} characters, more than the share of {self.calibration:g} for "
                f"calibration, which would be empty; {self._smaller_documents()}, or set calibration "
                "to 0 to score this text only."
            )
        if not evaluation:
            raise Refusal(
                f"{self.name}: each of the {dropped} documents after the calibration part shares a run of "
                f"{_OVERLAP} words with it, so none is left to evaluate; lower calibration, or use a text "
                "that does not repeat itself."
            )
        return calibration, evaluation, dropped

    def _cut(self, path: Path, how: str) -> list[str]:
        """Return the documents of the file at `path`, or of all files of that folder, cut as `how` says."""
        documents: list[str] = []
        for file, name in self._files(path):
            documents += split_documents(file.read_bytes(), how, name, self.column or "text")
        return list(dict.fromkeys(documents))

    def _files(self, path: Path) -> Iterator[tuple[Path, str]]:
        """Yield each file to read and its name in messages; refuse a folder's file of another format."""
        if path.is_file():
            yield path, self.name
            return
        for file in contents(path):
            inner = file.relative_to(path)
            if not file.is_file() or any(part.startswith(".") for part in inner.parts):
                continue
            if mistake := _contradiction(inner.name, self.documents):
                raise Refusal(f"{self.name}: in this folder, {mistake}, or move the file out of it.")
            yield file, f"{self.name}/{inner.as_posix()}"

    def _smaller_documents(self) -> str:
        """Say how this file can be cut into smaller documents."""
        other = {"lines": "paragraphs", "paragraphs": "lines", "files": "paragraphs"}.get(self.documents)
        if other:
            with fetched(self.source, self.file, self.sha256, data=True) as path:
                count = len(self._cut(path, other))
            if count > 1:
                return f"set documents to {other}, of which it has {count}"
        return f"cut it into more {_PIECES[self.documents]}"


def _contradiction(name: str, documents: str) -> str | None:
    """Say that a file's suffix asks for other `documents`; None if it does not."""
    suffix = PurePosixPath(name).suffix.lower()
    right = TABLE_SUFFIXES.get(suffix)
    if suffix == ".json":
        return f"{name} is JSON, not text; write an object a line as .jsonl and set documents: jsonl"
    if right in (None, documents):
        return None
    return f"{name} ends in {suffix}, which documents: {documents} would misread; write documents: {right}"


def split_documents(content: bytes, how: str, file: str, column: str = "text") -> list[str]:
    """Return the documents of a file in order, white space folded, without empty and repeated ones.

    Lines end at \\n, \\r\\n and \\r only: form feeds and the separators of Unicode are white space within a
    line. A byte-order mark, of the file or of one that was put behind another, is no part of the text.

    Args:
        file: the file's name in a refusal.
        column: the column of a table's texts.

    Raises:
        Refusal: the file is damaged or of another format, or its table has no such column of texts.
    """
    if how == "parquet":
        pieces = _of_parquet(content, file, column)
    else:
        try:
            text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
        except UnicodeDecodeError as error:
            raise Refusal(
                f"{file} is not UTF-8 text at byte {error.start}; save it in that encoding, or set documents "
                "to the file's format."
            ) from None
        if "\0" in text:
            raise Refusal(
                f"{file} has NUL characters, as UTF-16 and binary files have; save it as UTF-8 text, or set "
                "documents to the file's format."
            )
        text = text.replace("\n\ufeff", "\n")  # of a file behind another
        if how not in _TABLES:
            _check_no_json(text, file)
        if how == "csv":
            pieces = _of_csv(text, file, column)
        elif how == "jsonl":
            pieces = _of_jsonl(text, file, column)
        elif how == "files":
            pieces = [text]
        else:
            pieces = text.split("\n") if how == "lines" else re.split(r"\n\s*\n", text)
    return list(dict.fromkeys(folded for piece in pieces if (folded := " ".join(piece.split()))))


def _check_no_json(text: str, file: str) -> None:
    """Refuse JSON, whose names and brackets would be read as text.

    Raises:
        Refusal: the text begins with an object, or with a list of them.
    """
    start = text.lstrip()
    if not re.match(r'(?:\[\s*)?\{\s*"', start):
        return
    try:
        json.JSONDecoder().raw_decode(start)
    except json.JSONDecodeError:
        return
    raise Refusal(
        f"{file} is JSON, whose names and brackets would be read as text; write an object a "
        "line as .jsonl and set documents: jsonl."
    )


def _of_csv(text: str, file: str, column: str) -> list[str]:
    """Return a column of a csv, each of whose rows must have as many fields as its header."""
    csv.field_size_limit(len(text) + 1)  # by default a field has at most 131,072 characters
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = next(filter(None, reader), [])
        place = _text_column(header, "csv", file, column)
        pieces = []
        for row in filter(None, reader):
            if len(row) != len(header):
                raise Refusal(
                    f"{file} is no sound csv: its header has {len(header)} fields, the row that ends in "
                    f"line {reader.line_num} has {len(row)}; put texts with commas or line breaks in double "
                    "quotes."
                )
            pieces.append(row[place])
    except csv.Error as error:
        raise Refusal(
            f"{file} is no sound csv up to line {reader.line_num}: {error}; close every double quote, and "
            "write those within a text twice."
        ) from None
    return pieces


def _of_jsonl(text: str, file: str, column: str) -> list[str]:
    """Return a field of the object in each line, without nulls."""
    pieces = []
    for number, row in json_lines(text, file):
        if column not in row:
            _text_column(list(row), "line", f"{number} of {file}", column)
        if not isinstance(row[column], str | None):
            raise Refusal(
                f"{file}: in line {number} {column} is {type(row[column]).__name__}, not text; write it as a "
                "string, or set column to another field."
            )
        pieces += [row[column]] if row[column] is not None else []
    return pieces


def json_lines(text: str, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line that is not blank.

    Raises:
        Refusal: a line is no JSON object, or holds half a character.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refusal(
                f"{file}: line {number} is not JSON ({error}); write one whole object a line."
            ) from None
        if not isinstance(row, dict):
            raise Refusal(
                f'{file}: line {number} is a {type(row).__name__}, not an object; write {{"text": ...}}.'
            )
        if "\\u" in line and (half := _HALF.search(json.dumps(row, ensure_ascii=False))):
            raise Refusal(
                f"{file}: line {number} has \\u{ord(half[0]):04x}, half of a character that JSON writes as "
                "two; write both halves, or remove it."
            )
        yield number, row


def _of_parquet(content: bytes, file: str, column: str) -> list[str]:
    """Return a column of a parquet file, without missing values."""
    import pyarrow as pa

    try:
        rows = pd.read_parquet(io.BytesIO(content))
    except (pa.ArrowException, OSError):
        raise Refusal(
            f"{file} is not parquet, or damaged; set documents to the file's format, or download it again."
        ) from None
    _text_column(list(map(str, rows.columns)), "parquet", file, column)
    pieces = list(rows[column].dropna())
    if others := sorted({type(piece).__name__ for piece in pieces if not isinstance(piece, str)}):
        raise Refusal(
            f"{file}: its column {column} holds {', '.join(others)}; write it as strings, or set column to "
            "another."
        )
    return pieces


def _text_column(columns: list[str], kind: str, file: str, column: str) -> int:
    """Return the place of the only column of this name."""
    if columns.count(column) != 1:
        only = f"only {', '.join(columns)}" if columns else "for it is empty"
        several = f"has several columns {column}"
        problem = several if column in columns else f"has no column {column}, {only}"
        cure = (
            f"name the column of documents, and no other, {column}"
            if column in columns
            else (
                f"set column to the one of documents{', or add it' if kind == 'line' else ''}"
                if columns
                else "choose another file"
            )
        )
        raise Refusal(f"{'the ' if kind != 'line' else ''}{kind} {file} {problem}; {cure}.")
    return columns.index(column)


def split_calibration(documents: list[str], share: float) -> tuple[list[str], list[str], int]:
    """Return (calibration, evaluation, number of evaluation documents dropped for an overlap).

    Documents of each part are joined before runs are taken, so overlaps between short documents (verses,
    sentences) are caught too. A document that differs from a calibration document in punctuation or case
    only is dropped, however short it is.
    """
    limit = share * sum(map(len, documents))
    count = sum(end <= limit for end in accumulate(map(len, documents)))
    calibration, rest = documents[:count], documents[count:]
    evaluation = without_overlap(calibration, rest)
    return calibration, evaluation, len(rest) - len(evaluation)


def without_overlap(calibration: list[str], documents: list[str]) -> list[str]:
    """Return `documents` without those that overlap the calibration part, see `split_calibration`."""
    known = {tuple(_words(document)) for document in calibration}
    runs = _runs([word for document in calibration for word in _words(document)])
    evaluation: list[str] = []
    before: list[str] = []
    for document in documents:
        joined = before + _words(document)
        if tuple(_words(document)) not in known and runs.isdisjoint(_runs(joined)):
            evaluation.append(document)
            before = joined[1 - _OVERLAP :]
    return evaluation


def _words(document: str) -> list[str]:
    """Return a document's words in lower case, without punctuation."""
    return re.findall(r"\w+", document.lower())


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    """Return every run of 13 words."""
    return {tuple(words[start : start + _OVERLAP]) for start in range(len(words) - _OVERLAP + 1)}

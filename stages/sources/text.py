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
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.lazy import pd
from stages.core.schema import Sha256
from stages.sources.dataset import Dataset
from stages.sources.origin import InnerPath, Origin, fetched

_OVERLAP = 13
"""Words of a run that marks an overlap."""
_PIECES = {"lines": "lines", "paragraphs": "paragraphs", "csv": "rows", "parquet": "rows"}
"""What documents are in each format."""


class Text(Dataset):
    """A text file inside a source."""

    kind: Literal["text"]
    source: Origin
    file: InnerPath
    sha256: Sha256
    documents: Literal["lines", "paragraphs", "csv", "parquet"]
    """A document is a line, a paragraph between blank lines, or the text of a csv or parquet row."""
    calibration: Annotated[float, Field(ge=0, lt=1)]
    """Share of the characters for calibration or training; the rest is for evaluation."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `calibration.parquet` and `evaluation.parquet`, each with the column `text`.

        Raises:
            Refusal: the file cannot be cut into documents, or leaves one of the two parts empty.
        """
        with fetched(self.source, self.file, self.sha256, data=True) as path:
            content = path.read_bytes()
        file = f"{self.source} {self.file}"
        documents = split_documents(content, self.documents, file)
        if not documents:
            raise Refusal(
                f"{file} has no {_PIECES[self.documents]} with text; set documents to the file's format, or "
                "choose another file."
            )
        calibration, evaluation, dropped = split_calibration(documents, self.calibration)
        if self.calibration and not calibration:
            raise Refusal(
                f"{file}: its first document of {len(documents)} has {len(documents[0])} of "
                f"{sum(map(len, documents))} characters, more than the share of {self.calibration:g} for "
                f"calibration, which would be empty; {self._smaller_documents(content)}, or set calibration "
                "to 0 to score this text only."
            )
        if not evaluation:
            raise Refusal(
                f"{file}: each of the {dropped} documents after the calibration part shares a run of "
                f"{_OVERLAP} words with it, so none is left to evaluate; lower calibration, or use a text "
                "that does not repeat itself."
            )
        for name, texts in (("calibration", calibration), ("evaluation", evaluation)):
            pd.DataFrame({"text": pd.Series(texts, dtype="str")}).to_parquet(folder / f"{name}.parquet")
        return {
            "split": {"calibration": len(calibration), "evaluation": len(evaluation), "dropped": dropped},
            "characters": {
                "calibration": sum(map(len, calibration)),
                "evaluation": sum(map(len, evaluation)),
            },
        }

    def _smaller_documents(self, content: bytes) -> str:
        """Say how this file can be cut into smaller documents."""
        other = {"lines": "paragraphs", "paragraphs": "lines"}.get(self.documents)
        count = len(split_documents(content, other, self.file)) if other else 1
        if count > 1:
            return f"set documents to {other}, of which it has {count}"
        return f"cut it into more {_PIECES[self.documents]}"


def split_documents(content: bytes, how: str, file: str) -> list[str]:
    """Return the documents of a file in order, white space folded, without empty and repeated ones.

    Lines end at \\n, \\r\\n and \\r only: form feeds and the separators of Unicode are white space within a
    line. A byte-order mark, of the file or of one that was put behind another, is no part of the text.

    Args:
        file: the file's name in a refusal.

    Raises:
        Refusal: the file is damaged or of another format, or its table has no column `text`.
    """
    if how == "parquet":
        pieces = _of_parquet(content, file)
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
        if how == "csv":
            pieces = _of_csv(text, file)
        else:
            _check_no_json(text, file)
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
        f"{file} is JSON, whose names and brackets would be read as text; write its texts as parquet or csv, "
        "in a column text."
    )


def _of_csv(text: str, file: str) -> list[str]:
    """Return the column `text` of a csv, each of whose rows must have as many fields as its header."""
    csv.field_size_limit(len(text) + 1)  # by default a field has at most 131,072 characters
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = next(filter(None, reader), [])
        place = _text_column(header, "csv", file)
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


def _of_parquet(content: bytes, file: str) -> list[str]:
    """Return the column `text` of a parquet file, without missing values."""
    import pyarrow as pa

    try:
        rows = pd.read_parquet(io.BytesIO(content))
    except (pa.ArrowException, OSError):
        raise Refusal(
            f"{file} is not parquet, or damaged; set documents to the file's format, or download it again."
        ) from None
    _text_column(list(map(str, rows.columns)), "parquet", file)
    pieces = list(rows["text"].dropna())
    if others := sorted({type(piece).__name__ for piece in pieces if not isinstance(piece, str)}):
        raise Refusal(f"{file}: its column text holds {', '.join(others)}; write it as strings.")
    return pieces


def _text_column(columns: list[str], kind: str, file: str) -> int:
    """Return the place of the only column `text`."""
    if columns.count("text") != 1:
        only = f"only {', '.join(columns)}" if columns else "for it is empty"
        problem = "has several columns text" if "text" in columns else f"has no column text, {only}"
        raise Refusal(f"the {kind} {file} {problem}; name the column of documents, and no other, text.")
    return columns.index("text")


def split_calibration(documents: list[str], share: float) -> tuple[list[str], list[str], int]:
    """Return (calibration, evaluation, number of evaluation documents dropped for an overlap).

    Documents of each part are joined before runs are taken, so overlaps between short documents (verses,
    sentences) are caught too. A document that differs from a calibration document in punctuation or case
    only is dropped, however short it is.
    """
    limit = share * sum(map(len, documents))
    count = sum(end <= limit for end in accumulate(map(len, documents)))
    calibration, rest = documents[:count], documents[count:]
    known = {tuple(_words(document)) for document in calibration}
    runs = _runs([word for document in calibration for word in _words(document)])
    evaluation: list[str] = []
    before: list[str] = []
    for document in rest:
        joined = before + _words(document)
        if tuple(_words(document)) not in known and runs.isdisjoint(_runs(joined)):
            evaluation.append(document)
            before = joined[1 - _OVERLAP :]
    return calibration, evaluation, len(rest) - len(evaluation)


def _words(document: str) -> list[str]:
    """Return a document's words in lower case, without punctuation."""
    return re.findall(r"\w+", document.lower())


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    """Return every run of 13 words."""
    return {tuple(words[start : start + _OVERLAP]) for start in range(len(words) - _OVERLAP + 1)}

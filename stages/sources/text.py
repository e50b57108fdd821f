"""Running text in documents, split into a calibration and an evaluation part that have nothing in common.

The first documents are for calibration, the rest for evaluation. An evaluation document that shares a run of
13 words with the calibration part is dropped (the overlap test of the GPT-3 paper, 2005.14165), as a method
looks better than it is when it is evaluated on its own calibration text.
"""

from __future__ import annotations

import io
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
        """Write `calibration.parquet` and `evaluation.parquet`, each with the column `text`."""
        import pyarrow as pa

        with fetched(self.source, self.file, self.sha256, data=True) as path:
            try:
                documents = split_documents(path.read_bytes(), self.documents)
            except (UnicodeDecodeError, pa.ArrowInvalid) as error:
                expected = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "parquet"
                raise Refusal(
                    f"{self.source} {self.file} is not {expected}; set documents to the file's format."
                ) from None
        if not documents:
            raise Refusal(
                f"{self.source} {self.file} has no {self.documents} with text; set documents to the file's "
                "format, or choose another file."
            )
        calibration, evaluation, dropped = split_calibration(documents, self.calibration)
        for name, texts in (("calibration", calibration), ("evaluation", evaluation)):
            pd.DataFrame({"text": pd.Series(texts, dtype="str")}).to_parquet(folder / f"{name}.parquet")
        return {
            "split": {"calibration": len(calibration), "evaluation": len(evaluation), "dropped": dropped},
            "characters": {
                "calibration": sum(map(len, calibration)),
                "evaluation": sum(map(len, evaluation)),
            },
        }


def split_documents(content: bytes, how: str) -> list[str]:
    """Return the documents of a file in order, white space folded, without empty and repeated ones.

    Raises:
        Refusal: csv or parquet without a column `text`.
        UnicodeDecodeError, pyarrow.ArrowInvalid: not UTF-8, not parquet.
    """
    if how in ("csv", "parquet"):
        rows = (
            pd.read_parquet(io.BytesIO(content))
            if how == "parquet"
            else pd.read_csv(io.StringIO(content.decode()), dtype=str, keep_default_na=False)
        )
        if "text" not in rows:
            columns = ", ".join(map(str, rows.columns))
            raise Refusal(
                f"the {how} has no column text, only {columns}; rename the column of documents to text."
            )
        pieces = [str(piece) for piece in rows["text"].dropna()]
    elif how == "lines":
        pieces = content.decode().splitlines()
    else:
        pieces = re.split(r"\n\s*\n", content.decode())
    return list(dict.fromkeys(folded for piece in pieces if (folded := " ".join(piece.split()))))


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

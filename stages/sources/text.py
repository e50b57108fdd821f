"""Running text: cut into documents, and into a calibration and an evaluation split that share nothing.

The first documents calibrate, the rest evaluate. An evaluation document that shares a run of 13 words
with the calibration split is dropped (the overlap test of the GPT-3 paper, 2005.14165), as a method
calibrated on the very text it is judged on looks better than it is.
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

RUN = 13


class Text(Dataset):
    """A text file inside a source."""

    kind: Literal["text"]
    source: Origin
    file: InnerPath
    sha256: Sha256
    documents: Literal["lines", "paragraphs", "csv", "parquet"]
    """What a document is: a line, a run of lines between blank ones, or a row's text in a csv or parquet."""
    calibration: Annotated[float, Field(ge=0, lt=1)]
    """Share of the characters that may be calibrated or trained on; the rest evaluates."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `calibration.parquet` and `evaluation.parquet`, each with one column `text`."""
        import pyarrow as pa

        with fetched(self.source, self.file, self.sha256, data=True) as path:
            try:
                found = split_documents(path.read_bytes(), self.documents)
            except (UnicodeDecodeError, pa.ArrowInvalid) as error:
                expected = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "parquet"
                raise Refusal(f"{self.source} {self.file} is not {expected}.") from None
        if not found:
            raise Refusal(f"{self.source} {self.file} holds no {self.documents}.")
        seen, evaluation, dropped = split(found, self.calibration)
        for name, texts in (("calibration", seen), ("evaluation", evaluation)):
            pd.DataFrame({"text": pd.Series(texts, dtype="str")}).to_parquet(folder / f"{name}.parquet")
        return {
            "split": {"calibration": len(seen), "evaluation": len(evaluation), "dropped": dropped},
            "characters": {"calibration": sum(map(len, seen)), "evaluation": sum(map(len, evaluation))},
        }


def split_documents(content: bytes, how: str) -> list[str]:
    """The documents of a file in order, white space folded, empty and repeated ones dropped.

    Raises:
        Refusal: csv or parquet without a column `text`.
        UnicodeDecodeError, pyarrow.ArrowInvalid: it is no UTF-8, no parquet.
    """
    if how in ("csv", "parquet"):
        rows = (
            pd.read_parquet(io.BytesIO(content))
            if how == "parquet"
            else pd.read_csv(io.StringIO(content.decode()), dtype=str, keep_default_na=False)
        )
        if "text" not in rows:
            raise Refusal(f"the {how} has no column text; it has {', '.join(map(str, rows.columns))}.")
        pieces = [str(piece) for piece in rows["text"].dropna()]
    elif how == "lines":
        pieces = content.decode().splitlines()
    else:
        pieces = re.split(r"\n\s*\n", content.decode())
    return list(dict.fromkeys(folded for piece in pieces if (folded := " ".join(piece.split()))))


def split(documents: list[str], share: float) -> tuple[list[str], list[str], int]:
    """(calibration, evaluation, how many evaluation documents were dropped for sharing 13 words).

    Runs are those of each split as it is read, its documents joined, so that texts cut finely (verses,
    sentences) are held apart as well. A document that is a calibration document in other punctuation is
    dropped however short.
    """
    limit = share * sum(map(len, documents))
    ends = accumulate(map(len, documents))
    count = sum(end <= limit for end in ends)
    calibration, rest = documents[:count], documents[count:]
    taken = {tuple(words(document)) for document in calibration}
    seen = runs([word for document in calibration for word in words(document)])
    evaluation: list[str] = []
    before: list[str] = []
    for document in rest:
        joined = before + words(document)
        if tuple(words(document)) not in taken and seen.isdisjoint(runs(joined)):
            evaluation.append(document)
            before = joined[1 - RUN :]
    return calibration, evaluation, len(rest) - len(evaluation)


def words(document: str) -> list[str]:
    """Its words, lower-cased, without punctuation."""
    return re.findall(r"\w+", document.lower())


def runs(found: list[str]) -> set[tuple[str, ...]]:
    """Every run of 13 words."""
    return {tuple(found[i : i + RUN]) for i in range(len(found) - RUN + 1)}

"""Running text: cut into documents, and into a calibration and an evaluation split that share nothing.

The first documents calibrate, the rest evaluate. An evaluation document that shares a run of 13 words
with the calibration split is dropped (the overlap test of the GPT-3 paper, 2005.14165), as a method
calibrated on the very text it is judged on looks better than it is.
"""

import csv
import io
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from stages.core.errors import Refusal
from stages.core.schema import Sha256
from stages.download.dataset import Dataset
from stages.download.source import InnerPath, Origin, fetched

RUN = 13


class Text(Dataset):
    """A text file inside a source."""

    kind: Literal["text"]
    source: Origin
    file: InnerPath
    sha256: Sha256
    documents: Literal["lines", "paragraphs", "csv"]
    """What a document is: a line, a run of lines between blank ones, or the csv column `text`."""
    calibration: Annotated[float, Field(ge=0, lt=1)]
    """Share of the characters that may be calibrated or trained on; the rest evaluates."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `calibration.parquet` and `evaluation.parquet`, each with one column `text`."""
        with fetched(self.source, self.file, self.sha256) as path:
            found = split_documents(path.read_text(encoding="utf-8", errors="strict"), self.documents)
        if not found:
            raise Refusal(f"{self.source} {self.file} holds no {self.documents}.")
        seen, evaluation, dropped = split(found, self.calibration)
        for name, texts in (("calibration", seen), ("evaluation", evaluation)):
            pd.DataFrame({"text": pd.Series(texts, dtype="str")}).to_parquet(folder / f"{name}.parquet")
        return {
            "split": {"calibration": len(seen), "evaluation": len(evaluation), "dropped": dropped},
            "characters": {"calibration": sum(map(len, seen)), "evaluation": sum(map(len, evaluation))},
        }


def split_documents(text: str, how: str) -> list[str]:
    """The documents of `text` in order, white space folded, empty and repeated ones dropped."""
    if how == "csv":
        pieces = [row["text"] for row in csv.DictReader(io.StringIO(text))]
    elif how == "lines":
        pieces = text.splitlines()
    else:
        pieces = re.split(r"\n\s*\n", text)
    return list(dict.fromkeys(folded for piece in pieces if (folded := " ".join(piece.split()))))


def split(documents: list[str], share: float) -> tuple[list[str], list[str], int]:
    """(calibration, evaluation, how many evaluation documents were dropped for sharing 13 words)."""
    limit = share * sum(map(len, documents))
    calibration: list[str] = []
    for document in documents:
        if sum(map(len, calibration)) + len(document) > limit:
            break
        calibration.append(document)
    seen = {run for document in calibration for run in runs(document)}
    rest = documents[len(calibration) :]
    evaluation = [document for document in rest if not seen.intersection(runs(document))]
    return calibration, evaluation, len(rest) - len(evaluation)


def runs(document: str) -> set[tuple[str, ...]]:
    """Every run of 13 lower-cased words; a shorter document is one run by itself."""
    words = re.findall(r"\w+", document.lower())
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}

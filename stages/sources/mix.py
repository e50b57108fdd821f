"""Several texts in shares, to calibrate or train on more than one kind of text.

The text that a method is calibrated on decides which weights look useless. SparseGPT at 60 % keeps more of
a model on a uniform mix of sources than on web text alone (2606.03328). Each part is a text with its own
settings, split as if it stood alone, and a share: each part gives its share of the windows that a recipe asks
for (see `stages.corpus.windows`). An evaluation document that overlaps the calibration part of any text is
dropped (see `stages.sources.documents`); the others serve as held-out text in training. Suites score single
texts: give a part an entry of its own with the same settings.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from stages.core.errors import Refusal
from stages.core.lazy import pd
from stages.core.schema import Slug
from stages.sources.dataset import Dataset
from stages.sources.documents import Documents, without_overlap
from stages.sources.origin import portable

_ROUNDING = 1e-6
"""By how much shares may miss 1, as thirds have to."""


class MixPart(Documents):
    """A text of a mix."""

    kind: Literal["text"] = "text"
    share: Annotated[float, Field(gt=0, lt=1)]
    """Its share of the windows."""


def _whole(parts: dict[str, MixPart]) -> dict[str, MixPart]:
    """Require shares that make 1, texts to learn from, and no file twice."""
    total = math.fsum(part.share for part in parts.values())
    if abs(total - 1) > _ROUNDING:
        raise ValueError(f"the shares of {', '.join(parts)} make {total:g}; let them make 1")
    if empty := [name for name, part in parts.items() if not part.calibration]:
        raise ValueError(
            f"{', '.join(empty)} has calibration 0, so nothing of it may be learned from; raise it"
        )
    if len({part.sha256 for part in parts.values()}) < len(parts):
        raise ValueError("two parts are the same file; name each file once, with the sum of their shares")
    return parts


class Mix(Dataset):
    """Two or more texts in shares."""

    kind: Literal["mix"]
    parts: Annotated[dict[Slug, MixPart], Field(min_length=2), AfterValidator(_whole)]

    def splits(self) -> dict[str, tuple[list[str], list[str], int]]:
        """Return (calibration, evaluation, number of evaluation documents dropped) of each part.

        Raises:
            Refusal: a part cannot be cut into documents, or leaves one of its splits empty.
        """
        alone = {name: part.split() for name, part in self.parts.items()}
        learned = [document for calibration, _, _ in alone.values() for document in calibration]
        splits = {}
        for name, (calibration, rest, dropped) in alone.items():
            evaluation = without_overlap(learned, rest)
            splits[name] = (calibration, evaluation, dropped + len(rest) - len(evaluation))
        if empty := [name for name, (_, evaluation, _) in splits.items() if not evaluation]:
            raise Refusal(
                f"each evaluation document of {', '.join(empty)} repeats a calibration document of another "
                "part, so none is left to hold out; leave one of these parts out."
            )
        return splits

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `calibration.parquet` and `evaluation.parquet`: columns `text`, `part` and `share`.

        Raises:
            Refusal: see `splits`.
        """
        splits = self.splits()
        documents = {
            "calibration": {name: calibration for name, (calibration, _, _) in splits.items()},
            "evaluation": {name: evaluation for name, (_, evaluation, _) in splits.items()},
        }
        for split, texts in documents.items():
            rows = [
                {"text": text, "part": name, "share": self.parts[name].share}
                for name in texts
                for text in texts[name]
            ]
            pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
        return {
            "source": " + ".join(
                f"{part.share:g} {portable({'source': part.source})['source']} {part.file}".rstrip()
                for part in self.parts.values()
            ),
            "split": {
                name: {"calibration": len(calibration), "evaluation": len(evaluation), "dropped": dropped}
                for name, (calibration, evaluation, dropped) in splits.items()
            },
        }

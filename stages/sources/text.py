"""A text, split into a calibration and an evaluation part; see `stages.sources.documents`."""

from pathlib import Path
from typing import Any

from stages.core.lazy import pd
from stages.sources.documents import Documents


class Text(Documents):
    """A text that is a data set of its own."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `calibration.parquet` and `evaluation.parquet`, each with the column `text`.

        Raises:
            Refusal: the file cannot be cut into documents, or leaves one of the two parts empty.
        """
        calibration, evaluation, dropped = self.split()
        for name, texts in (("calibration", calibration), ("evaluation", evaluation)):
            pd.DataFrame({"text": pd.Series(texts, dtype="str")}).to_parquet(folder / f"{name}.parquet")
        return {
            "split": {"calibration": len(calibration), "evaluation": len(evaluation), "dropped": dropped},
            "characters": {
                "calibration": sum(map(len, calibration)),
                "evaluation": sum(map(len, evaluation)),
            },
        }

"""What every downloaded data set has in common: a folder of parquet and a `dataset.json` beside it."""

from pathlib import Path
from typing import Any

from stages.core.files import DATASETS, write_json, writing
from stages.core.schema import Strict
from stages.sources.origin import portable


class Dataset(Strict):
    """A data set: each kind writes its own files."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the parquet files into `folder`; return facts for `dataset.json`."""
        raise NotImplementedError

    def download(self, key: str) -> None:
        """Write data/datasets/<key>.

        Raises:
            Refusal: the source cannot be had or is not what params say.
        """
        with writing(DATASETS / key) as folder:
            facts = self.write(folder)
            write_json(
                folder / "dataset.json", {"dataset": key, **portable(self.model_dump(mode="json")), **facts}
            )

"""Download shared by data sets of every kind: a folder of parquet files with a `dataset.json`."""

from pathlib import Path
from typing import Any

from stages.core.files import DATASET, DATASETS, write_json, writing
from stages.core.schema import Strict
from stages.sources.origin import portable


class Dataset(Strict):
    """A data set; each kind writes its own files."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the parquet files into `folder`; return facts for `dataset.json`."""
        raise NotImplementedError

    def download(self, key: str) -> None:
        """Write data/datasets/<key>.

        Raises:
            Refusal: the source cannot be fetched or differs from params.
        """
        with writing(DATASETS / key) as folder:
            facts = self.write(folder)
            write_json(folder / DATASET, {"dataset": key, **portable(self.model_dump(mode="json")), **facts})

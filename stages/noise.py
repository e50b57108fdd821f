"""Noise: a model as a candidate again, its arithmetic changed by batch size, dtype, engine or rounding noise.

The weights are those of the source, byte for byte; only the arithmetic differs. In bf16 the batch size alone
changes some answers, and a difference between two models that is no larger than this means nothing.
"""

import shutil

from stages.controls.candidates import Noise
from stages.core.files import MODELS, RECORD, write_json, writing
from stages.job.entry import entry
from stages.model.artifact import load_record


def noise(variant: Noise, name: str) -> None:
    """Copy the variant's source into data/models/noise/<name>, with the difference in its record."""
    with writing(MODELS / "noise" / name) as folder:
        shutil.copytree(MODELS / variant.source, folder, dirs_exist_ok=True)
        record = load_record(variant.source)
        record |= {
            "artifact": f"noise/{name}",
            "lineage": [*record["lineage"], f"noise/{name}"],
            **variant.model_dump(include={"batch_size", "dtype", "backend", "rounding"}, exclude_none=True),
        }
        write_json(folder / RECORD, record)


if __name__ == "__main__":
    entry(noise)

"""Floor: make a candidate of a responder without knowledge.

It uses its source's tokenizer and chat template and has no weights; `stages.controls.responders` says how it
answers.
"""

import shutil

from stages.controls.candidates import Floor
from stages.core.files import MODELS, RECORD, write_json, writing
from stages.job.entry import entry
from stages.model.artifact import load_record

_SIZES = (
    "num_parameters",
    "bits_per_weight",
    "bytes_ideal",
    "bytes_on_disk",
    "sparsity",
    "sparsity_by_block",
)


def floor(variant: Floor, name: str) -> None:
    """Write data/models/floor/<name>: the source's folder without weights, the responder in its record."""
    with writing(MODELS / "floor" / name) as folder:
        weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
        shutil.copytree(MODELS / variant.source, folder, ignore=weights, dirs_exist_ok=True)
        record = load_record(variant.source)
        record |= {
            "artifact": f"floor/{name}",
            "lineage": [*record["lineage"], f"floor/{name}"],
            "responder": variant.responder,
            **{size: type(record[size])() for size in _SIZES},  # 0, or an empty list
        }
        write_json(folder / RECORD, record)


if __name__ == "__main__":
    entry(floor)

"""Checkpoints in folders of safetensors: what is refused before a weight is read."""

from pathlib import Path
from typing import Any

from stages.core.errors import Refusal
from stages.core.files import NO_CONTENT, read_json
from stages.core.reading import reading

ADAPTER = "adapter_config.json"
"""The file by which transformers and peft know an adapter."""


def checkpoint_config(path: Path, source: str) -> dict[str, Any]:
    """Return the config of the checkpoint in the folder `path`; no weight is read.

    Raises:
        Refusal: the folder has no safetensors or no config, is an adapter, or needs code of its own.
    """
    from transformers import AutoConfig

    if path.is_file():
        raise Refusal(f"{source}: {path.name} is a file; name the folder of the checkpoint.")
    _check_adapter(path, source)
    if not list(path.glob("*.safetensors")):
        raise Refusal(
            f"{source} has no safetensors, and pickle formats are never loaded; use a checkpoint in "
            "safetensors."
        )
    if not (path / "config.json").exists():
        raise Refusal(f"{source} has no config.json; use a transformers checkpoint.")
    with reading(f"the config of {source}"):
        config = read_json(path / "config.json")
        if not isinstance(config, dict):
            raise TypeError(f"config.json holds a {type(config).__name__}, not settings by name")
        (config.get("quantization_config") or {}).get("quant_method")
    _check_shards(path, source)
    if "auto_map" in config:
        raise Refusal(
            f"{source} needs code of its own (auto_map), which is never run; use a model that transformers "
            "has built in."
        )
    with reading(f"the config of {source}"):  # the tokenizer reads it too, and would be blamed
        AutoConfig.from_pretrained(path, local_files_only=True)
    return config


def _check_adapter(folder: Path, source: str) -> None:
    """Refuse an adapter, which transformers would attach to the model beside it without a word."""
    if not (folder / ADAPTER).exists():
        return
    if (folder / "config.json").exists():
        raise Refusal(
            f"{source} holds an adapter ({ADAPTER}) beside the model; merge it into the model (peft's "
            f"merge_and_unload), or remove {ADAPTER} to use the model without it."
        )
    raise Refusal(
        f"{source} is an adapter ({ADAPTER}) without its model; merge it into the model (peft's "
        "merge_and_unload) and use what that saves."
    )


def _check_shards(folder: Path, source: str) -> None:
    """Refuse an index whose shards are not files of this folder, as its hash would not cover them."""
    for index in folder.glob("*.safetensors.index.json"):
        with reading(f"{index.name} of {source}"):
            shards = sorted(set(read_json(index)["weight_map"].values()))
        outside = [
            shard for shard in shards
            if Path(shard).name != shard or shard in NO_CONTENT or not (folder / shard).is_file()
        ]  # fmt: skip
        if outside:
            raise Refusal(
                f"{index.name} of {source} names {', '.join(map(repr, outside[:4]))}, which is no file of "
                "its folder; put all shards beside the index."
            )

"""Base models stored as transformers checkpoints: safetensors, a config and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stages.core.errors import Refusal
from stages.core.files import NO_CONTENT, read_json
from stages.core.lazy import torch
from stages.core.reading import reading
from stages.core.schema import Sha256
from stages.model.artifact import pretrained
from stages.sources.base import Model, write_checkpoint
from stages.sources.origin import InnerPath, fetched
from stages.sources.tokenizer import original_tokenizer

ADAPTER = "adapter_config.json"
"""The file by which transformers and peft know an adapter."""
_FLOATS = ("F16", "BF16", "F32", "F64", "F8")
"""How safetensors names the dtypes of weights that stand for themselves."""


class Safetensors(Model):
    """A folder with `*.safetensors`. `sha256` is needed for `path:`; a commit pins the hub's content."""

    format: Literal["safetensors"]
    folder: InnerPath = ""
    sha256: Sha256 | None = None

    def write(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Write config, tokenizer and `dtype` safetensors into `folder`; return facts for the record.

        Raises:
            Refusal: the checkpoint has no safetensors, is incomplete, has tensors that no parameter takes or
                weights that are no floats, or needs code of its own.
        """
        from transformers import AutoConfig, CompressedTensorsConfig

        with fetched(self.source, self.folder, self.sha256) as path:
            _check_adapter(path, self.source)
            if not list(path.glob("*.safetensors")):
                raise Refusal(
                    f"{self.source} has no safetensors, and pickle formats are never loaded; use a "
                    "checkpoint in safetensors."
                )
            if not (path / "config.json").exists():
                raise Refusal(f"{self.source} has no config.json; use a transformers checkpoint.")
            with reading(f"the config of {self.source}"):
                config = read_json(path / "config.json")
                if not isinstance(config, dict):
                    raise TypeError(f"config.json holds a {type(config).__name__}, not settings by name")
                quantization = config.get("quantization_config") or {}
                packing = quantization.get("quant_method")
            if quantization and packing != "compressed-tensors":
                raise Refusal(
                    f"{self.source} is quantized with {packing!r}; use a plain checkpoint or one of "
                    "compressed-tensors."
                )
            _check_shards(path, self.source)
            if not quantization:
                _check_floats(path, self.source)
            if "auto_map" in config:
                raise Refusal(
                    f"{self.source} needs code of its own (auto_map), which is never run; use a model that "
                    "transformers has built in."
                )
            with reading(f"the config of {self.source}"):  # the tokenizer reads it too, and would be blamed
                AutoConfig.from_pretrained(path, local_files_only=True)
            original_tokenizer(path, self.source).save_pretrained(folder)
            model = pretrained(
                self.source,
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                **({"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantization else {}),
            )
            facts = write_checkpoint(model, self.source, folder)
        grid = {"format": packing, **quantization} if quantization else None
        return {"grid": grid, **facts}


def _check_floats(folder: Path, source: str) -> None:
    """Refuse weights stored as other numbers than floats, which loading would take for the values.

    Raises:
        Refusal: by the names of the tensors.
    """
    from safetensors import safe_open

    others = []
    for file in sorted(folder.glob("*.safetensors")):
        with reading(f"{file.name} of {source}"), safe_open(file, framework="pt") as stored:
            weights = [key for key in sorted(stored.keys()) if key.endswith("weight")]
            dtypes = {key: stored.get_slice(key).get_dtype() for key in weights}
        others += [f"{key} ({dtype})" for key, dtype in dtypes.items() if not dtype.startswith(_FLOATS)]
    if others:
        raise Refusal(
            f"{source} stores {len(others)} weights as codes or other numbers than floats, without a "
            f"quantization_config that says what they stand for: {', '.join(others[:8])}; use a checkpoint "
            "in bfloat16, float16 or float32."
        )


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

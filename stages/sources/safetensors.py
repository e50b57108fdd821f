"""Base models stored as transformers checkpoints: safetensors, a config and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.reading import reading
from stages.core.schema import Sha256
from stages.model.artifact import pretrained
from stages.sources.base import Model, write_checkpoint
from stages.sources.checkpoints import checkpoint_config
from stages.sources.origin import InnerPath, fetched
from stages.sources.tokenizer import original_tokenizer

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
        from transformers import CompressedTensorsConfig

        with fetched(self.source, self.folder, self.sha256) as path:
            config = checkpoint_config(path, self.source)
            quantization = config.get("quantization_config") or {}
            packing = quantization.get("quant_method")
            if quantization and packing != "compressed-tensors":
                raise Refusal(
                    f"{self.source} is quantized with {packing!r}; use a plain checkpoint or one of "
                    "compressed-tensors, or set format: packed to evaluate it as it is."
                )
            if not quantization:
                _check_floats(path, self.source)
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

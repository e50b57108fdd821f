"""GGUF files: their weights as a plain checkpoint, and the grids that these lie on."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.reading import reading
from stages.model.artifact import pretrained
from stages.sources.base import write_checkpoint

_GROUP_SIZES = {
    "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "Q2_K": 16, "Q3_K": 16, "Q6_K": 16,
}  # fmt: skip
_FLOAT_TYPES = ("F16", "F32", "BF16")


def dequantized_gguf(path: Path, source: str, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write config, tokenizer and `dtype` safetensors into `folder`; return facts for the record.

    Args:
        path: the GGUF file.
        source: its name in a refusal.

    Raises:
        Refusal: it is no file, cannot be read, or is no causal language model.
    """
    from transformers import AutoTokenizer, GgufConfig

    if path.is_dir():
        raise Refusal(f"{source} is a folder; name the .gguf file in it.")
    # The conversion logs its whole map of tensors; the progress bar is enough.
    logging.getLogger("gguf").setLevel(logging.WARNING)
    with reading(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)
    model = pretrained(
        source, path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    return {"grid": count_grids(path), **write_checkpoint(model, source, folder)}


def count_grids(path: Path) -> dict[str, Any] | None:
    """Return the numbers of tensors and weights of each type in a GGUF file, and the type of most weights.

    None when every tensor is a float.
    """
    from gguf import GGUFReader

    tensors, weights = Counter[str](), Counter[str]()
    for tensor in GGUFReader(path).tensors:
        tensors[tensor.tensor_type.name] += 1
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    quantized = {name: count for name, count in weights.items() if name not in _FLOAT_TYPES}
    if not quantized:
        return None
    main = max(quantized, key=lambda name: quantized[name])
    return {
        "format": main,
        "group_size": _GROUP_SIZES.get(main),
        "tensors": dict(sorted(tensors.items())),
        "weights": dict(sorted(weights.items())),
    }

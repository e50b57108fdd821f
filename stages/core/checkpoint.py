"""Writing a model artifact, and the one definition of how large it is.

Sizes are defined once, here:

- `sparsity`: share of exact zeros among the weights of the block linears.
- `bytes_ideal`: what a perfect container would need. A tensor takes 16 (or 32) bits a value, a
  quantized one its code bits plus its scales. Where it is smaller, a block linear's weight is stored as
  its nonzero values plus a bitmap of one bit a position. Embeddings are counted; tied ones once.
- `bits_per_weight`: `bytes_ideal` * 8 over the number of parameters.
- `bytes_on_disk`: the safetensors as they are. Unstructured zeros save nothing here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from stages.core.artifact import MODELS, RECORD, load_record, load_tokenizer
from stages.core.atomic import writing
from stages.core.blocks import Linear, linears
from stages.core.errors import Refusal
from stages.core.grid import Codes
from stages.core.packed import read_codes, write_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.core.run import Run


def finish_base(artifact: str, folder: Path, base: Mapping[str, Any]) -> "PreTrainedModel":
    """Write the record of a downloaded checkpoint in `folder` and return the model.

    Args:
        base: what is known of where it came from: name, source, hashes, `grid`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    _finish(
        folder, model, {}, {"artifact": artifact, "lineage": [artifact], "recipes": {}, "base": dict(base)}
    )
    return model


def save(
    artifact: str,
    model: "PreTrainedModel",
    recipe: Mapping[str, Any],
    run: "Run",
    *,
    codes: Mapping[str, Codes] | None = None,
    keep: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model computed from `recipe["source"]`, and return its record.

    Args:
        model: dense, in place; the weights that `codes` names are the dequantized ones.
        codes: quantized weights by the full name of their linear. They are written packed, in
            compressed-tensors' format, or, where that format would skip them silently (GPT-2's Conv1D),
            as a dense checkpoint whose record says `fake_quantized`.
        keep: positions that must be zero in the written file, see `zero_masks`.
        notes: further facts for the record, constant from run to run.
    """
    codes = codes or {}
    source = load_record(recipe["source"])
    record = {
        "artifact": artifact,
        "lineage": [*source["lineage"], artifact],
        "recipes": {**source["recipes"], artifact: dict(recipe)},
        "base": source["base"],
        "notes": {**source.get("notes", {}), **({artifact: dict(notes)} if notes else {})},
        "numerics": run.numerics(),
    }
    with writing(MODELS / artifact) as folder:
        packed = bool(codes) and all(isinstance(model.get_submodule(name), nn.Linear) for name in codes)
        model.config.__dict__.pop("quantization_config", None)
        if packed:
            write_packed(model, codes, folder)
        else:
            model.save_pretrained(folder)
        load_tokenizer(recipe["source"]).save_pretrained(folder)
        layout: Literal["dense", "pack-quantized", "fake_quantized"] = (
            "pack-quantized" if packed else "fake_quantized" if codes else "dense"
        )
        _check_kept(keep or {}, folder)
        return _finish(folder, model, codes, {**record, "layout": layout})


def _finish(
    folder: Path, model: "PreTrainedModel", codes: Mapping[str, Codes], record: dict[str, Any]
) -> dict[str, Any]:
    record = {"layout": "dense", **record, **measure(model, codes)}
    record["bytes_on_disk"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return record


def measure(model: nn.Module, codes: Mapping[str, Codes]) -> dict[str, Any]:
    """`num_parameters`, `sparsity`, `bytes_ideal` and `bits_per_weight`; see the module's docstring."""
    try:
        block_linears = linears(model, partial=True)
    except Refusal:  # an architecture no walk serves can still be a base, measured as dense
        block_linears = []
    quantized = {f"{name}.weight": code for name, code in codes.items()}
    in_blocks = {f"{linear.name}.weight" for linear in block_linears}
    bits = total = zeros = prunable = 0
    for name, parameter in model.named_parameters():  # a tied tensor is named once
        count = parameter.numel()
        nonzero = int(torch.count_nonzero(quantized[name].codes if name in quantized else parameter))
        width = quantized[name].bits if name in quantized else parameter.element_size() * 8
        bits += min(count * width, nonzero * width + count) if name in in_blocks else count * width
        if name in quantized:
            bits += quantized[name].scale.numel() * quantized[name].scale.element_size() * 8
        total += count
        if name in in_blocks:
            prunable += count
            zeros += count - nonzero
    return {
        "num_parameters": total,
        "sparsity": zeros / prunable if prunable else 0.0,
        "bytes_ideal": -(-bits // 8),
        "bits_per_weight": bits / total,
    }


def zero_masks(found: list[Linear]) -> dict[str, Tensor]:
    """Where each linear's weight is exactly zero, bool, shaped as stored, by the linear's full name."""
    return {linear.name: linear.module.get_parameter("weight").data == 0 for linear in found}


def _check_kept(masks: Mapping[str, Tensor], folder: Path) -> None:
    """Assert on the written file that every position of `masks` still dequantizes to zero.

    Raises:
        AssertionError: a zero was lost between memory and disk; a bug, never a user's mistake.
    """
    files = sorted(folder.glob("*.safetensors"))
    seen = 0
    for file in files:
        with safe_open(file, "pt") as handle:
            names = set(handle.keys())
            for name, mask in masks.items():
                if f"{name}.weight_packed" in names:
                    stored = read_codes(handle, name, folder)
                elif f"{name}.weight" in names:
                    stored = handle.get_tensor(f"{name}.weight")
                else:
                    continue
                seen += 1
                lost = int((stored[mask.cpu()] != 0).sum())
                if lost:
                    raise AssertionError(f"{name}: {lost} of {int(mask.sum())} zeros lost in {folder}")
    if seen != len(masks):
        raise AssertionError(f"{folder} holds {seen} of {len(masks)} masked linears")

"""Writing a model artifact, and the one definition of how large it is.

Sizes are defined once, here:

- `sparsity`: share of exact zeros among the weights of the block linears.
- `bytes_ideal`: what a perfect container would need. A tensor takes 16 (or 32) bits a value, a
  quantized one its code bits plus its scales. Where it is smaller, a block linear's weight is stored as
  its nonzero values plus a bitmap of one bit a position. Embeddings are counted; tied ones once.
- `bits_per_weight`: `bytes_ideal` * 8 over the number of parameters.
- `bytes_on_disk`: the safetensors as they are. Unstructured zeros save nothing here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from stages.core.errors import Refusal
from stages.core.files import DATASET, DATASETS, MODELS, RECORD, read_json, writing
from stages.core.lazy import torch
from stages.core.numbers import check_finite
from stages.model.artifact import load_record, load_tokenizer, pretrained
from stages.model.blocks import Linear, linears
from stages.model.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.core.run import Run
    from stages.core.schema import Recipe


class Sizes:
    """The sums the sizes of the module's docstring are made of, tensor by tensor."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, tensor: Tensor, code: Quantized | None, *, prunable: bool) -> None:
        """Count one tensor in, or the `code` it is stored as; `prunable` is a block linear's weight."""
        count = tensor.numel()
        bits = count * tensor.element_size() * 8 if code is None else code.stored_bits()
        if prunable:
            zeros = count - (int(torch.count_nonzero(tensor)) if code is None else code.nonzero())
            width = tensor.element_size() * 8 if code is None else code.bits
            bits -= max(0, zeros * width - count)  # nonzero values and a bitmap, where that is smaller
            self.counts += Counter(prunable=count, zeros=zeros)
        self.counts += Counter(parameters=count, bits=bits)

    def merge(self, counts: Mapping[str, int]) -> None:
        """Count in what another one counted."""
        self.counts.update(counts)

    def told(self) -> dict[str, Any]:
        """`num_parameters`, `sparsity`, `bytes_ideal` and `bits_per_weight`."""
        total, prunable = self.counts["parameters"], self.counts["prunable"]
        return {
            "num_parameters": total,
            "sparsity": self.counts["zeros"] / prunable if prunable else 0.0,
            "bytes_ideal": -(-self.counts["bits"] // 8),
            "bits_per_weight": self.counts["bits"] / total,
        }


def measure(model: nn.Module, quantized: Mapping[str, Quantized] | None = None) -> dict[str, Any]:
    """The sizes of a model in memory, dense but for the linears that are stored as codes, by full name."""
    codes = {f"{linear}.weight": code for linear, code in (quantized or {}).items()}
    try:
        inside = {f"{linear.name}.weight" for linear in linears(model, partial=True)}
    except Refusal:  # an architecture no walk serves can still be a base, measured as dense
        inside = set()
    sizes = Sizes()
    for name, parameter in model.named_parameters():  # a tied tensor is named once
        sizes.add(parameter, codes.get(name), prunable=name in inside)
    return sizes.told()


def lineage(artifact: str, recipe: Recipe, run: Run, notes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a record that says how `artifact` was made from the recipe's source."""
    source = load_record(recipe.source)
    return {
        "artifact": artifact,
        "lineage": [*source["lineage"], artifact],
        "recipes": {**source["recipes"], artifact: recipe.model_dump(mode="json")},
        "base": source["base"],
        "texts": {**source.get("texts", {}), **_texts(recipe)},
        "notes": {**source.get("notes", {}), **({artifact: dict(notes)} if notes else {})},
        "numerics": run.numerics(),
    }


def _texts(recipe: Recipe) -> dict[str, str]:
    """Return where the data sets that a recipe reads come from, by name."""
    names = [text.dataset for text in recipe.reads().values()]
    described = {name: read_json(DATASETS / name / DATASET) for name in names}
    return {name: facts.get("source", "reasoning-gym") for name, facts in described.items()}


def finish_base(artifact: str, folder: Path, base: Mapping[str, Any]) -> PreTrainedModel:
    """Write the record of a downloaded checkpoint in `folder` and return the model.

    Args:
        base: what is known of where it came from: name, source, hashes, `grid`.
    """
    model = pretrained(artifact, folder, dtype="auto")
    _finish(folder, model, {"artifact": artifact, "lineage": [artifact], "recipes": {}, "base": dict(base)})
    return model


def save(
    artifact: str,
    model: PreTrainedModel,
    recipe: Recipe,
    run: Run,
    *,
    keep: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Quantized] | None = None,
) -> dict[str, Any]:
    """Write a model in memory, computed from the recipe's source, and return its record.

    Args:
        keep: positions that must be zero in the written file, see `zero_masks`.
        notes: further facts for the record, constant from run to run.
        quantized: what linears are on their grid, by full name, all of one scheme that a format holds:
            they are written packed instead of the model's weights.

    Raises:
        Refusal: a parameter is no number.
        AssertionError: a zero or a code was lost between memory and disk.
    """
    from stages.model.packed import described, tensors_of, weight_from

    codes = quantized or {}
    scheme = next(iter(codes.values())).scheme() if codes else None
    check_finite(artifact, model.named_parameters())
    with writing(MODELS / artifact) as folder:
        model.config.__dict__.pop("quantization_config", None)
        tensors = model.state_dict()
        for linear, code in codes.items():
            del tensors[f"{linear}.weight"]
            tensors |= tensors_of(linear, code)
        model.save_pretrained(folder, state_dict=tensors)
        if codes:
            described(model, codes.keys(), scheme).save_pretrained(folder)
        load_tokenizer(recipe.source).save_pretrained(folder)
        if keep or codes:
            stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
            check_zeros(keep or {}, lambda name: weight_from(stored, f"{name}.weight", scheme))
            check_codes(codes, lambda name: weight_from(stored, f"{name}.weight", scheme))
        told = lineage(artifact, recipe, run, notes)
        told["layout"] = scheme["format"] if scheme else "dense"
        return _finish(folder, model, told, codes)


def _finish(
    folder: Path,
    model: PreTrainedModel,
    record: dict[str, Any],
    codes: Mapping[str, Quantized] | None = None,
) -> dict[str, Any]:
    record = {"layout": "dense", **record, **measure(model, codes)}
    record["bytes_on_disk"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return record


def zero_masks(found: Iterable[Linear]) -> dict[str, Tensor]:
    """Where each linear's weight is exactly zero, bool, shaped as stored, by the linear's full name."""
    return {linear.name: linear.module.get_parameter("weight").data == 0 for linear in found}


def check_zeros(masks: Mapping[str, Tensor], stored: Callable[[str], Tensor]) -> None:
    """Assert on what was read back that every position of `masks` is still zero.

    Args:
        stored: a linear's weight as the written file has it, by the linear's full name.

    Raises:
        AssertionError: a zero was lost between memory and disk; a bug, never a user's mistake.
    """
    for name, mask in masks.items():
        lost = int((stored(name)[mask.cpu()] != 0).sum())
        if lost:
            raise AssertionError(f"{name}: {lost} of {int(mask.sum())} zeros were lost in writing")


def check_codes(codes: Mapping[str, Quantized], stored: Callable[[str], Tensor]) -> None:
    """Assert on what was read back that linears are what their codes stand for.

    Args:
        stored: a linear's weight as the written file has it, by the linear's full name.

    Raises:
        AssertionError: a code was lost between memory and disk.
    """
    for name, code in codes.items():
        if not torch.equal(stored(name), code.dequantize().cpu()):
            raise AssertionError(f"{name}: the codes on disk are not those computed")

"""Writing a model artifact, and the definition of its sizes.

- `sparsity`: share of exact zeros among the weights of the block linears; `sparsity_by_block`: in each block.
- `bytes_ideal`: bytes in a perfect container. A dense tensor takes 16 (or 32) bits per value, a quantized one
  its codes and scales. A block linear's weight takes its nonzero values plus a bitmap of one bit per position
  where that is smaller. Embeddings count; tied ones count once.
- `bits_per_weight`: 8 * `bytes_ideal` over the number of parameters.
- `bytes_on_disk`: the safetensors as they are. Unstructured zeros save nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.files import MODELS, source_of, writing
from stages.core.lazy import torch
from stages.core.numbers import check_finite
from stages.model.artifact import (
    bytes_on_disk,
    check_loads,
    load_record,
    load_tokenizer,
    pretrained,
    write_record,
)
from stages.model.blocks import Linear, blocks, linears
from stages.model.grid import Quantized
from stages.model.names import as_stored, naming

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.core.run import Run
    from stages.core.schema import Recipe


class Sizes:
    """A running count of a model's parameters, zeros and bits, tensor by tensor."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._by_block: list[float | None] = []

    def add(self, tensor: Tensor, code: Quantized | None, *, prunable: bool) -> None:
        """Count a tensor, or the `code` it is stored as.

        Args:
            prunable: whether it is the weight of a block linear.
        """
        count = tensor.numel()
        bits = count * tensor.element_size() * 8 if code is None else code.stored_bits()
        if prunable:
            zeros = count - (int(torch.count_nonzero(tensor)) if code is None else code.nonzero())
            width = tensor.element_size() * 8 if code is None else code.bits
            bits -= max(0, zeros * width - count)  # a bitmap and nonzero values, where that is smaller
            self.counts += Counter(prunable=count, zeros=zeros)
        self.counts += Counter(parameters=count, bits=bits)

    def add_block(self, counts: Mapping[str, int]) -> None:
        """Add the counts of another `Sizes`, which are those of the next block."""
        self.counts.update(counts)
        self._by_block.append(_sparsity(counts))

    def summary(self) -> dict[str, Any]:
        """Return `num_parameters`, `sparsity`, `sparsity_by_block`, `bytes_ideal` and `bits_per_weight`.

        A block without linears has no sparsity: None.
        """
        total = self.counts["parameters"]
        return {
            "num_parameters": total,
            "sparsity": _sparsity(self.counts) or 0.0,
            "sparsity_by_block": list(self._by_block),
            "bytes_ideal": -(-self.counts["bits"] // 8),
            "bits_per_weight": self.counts["bits"] / total,
        }


def _sparsity(counts: Mapping[str, int]) -> float | None:
    """Return the share of zeros among the weights that could be pruned; None if there are none."""
    return counts.get("zeros", 0) / counts["prunable"] if counts.get("prunable") else None


def sizes_of(model: nn.Module, quantized: Mapping[str, Quantized] | None = None) -> dict[str, Any]:
    """Return the sizes of a model in memory, see `Sizes.summary`.

    Args:
        quantized: the codes of linears that are stored on a grid, by full name; all others are dense.
    """
    codes = {f"{linear}.weight": code for linear, code in (quantized or {}).items()}
    try:
        prunable = {f"{linear.name}.weight" for linear in linears(model, partial=True)}
        names = [name for name, _ in blocks(model)]
    except Refusal:  # a base may have an architecture that no method serves
        prunable, names = set(), []
    inside = {name: Sizes() for name in names}
    sizes = Sizes()
    for name, parameter in model.named_parameters():  # names a tied tensor once
        block = next((block for block in names if name.startswith(f"{block}.")), None)
        part = sizes if block is None else inside[block]
        part.add(parameter, codes.get(name), prunable=name in prunable)
    for part in inside.values():
        sizes.add_block(part.counts)
    return sizes.summary()


def lineage(artifact: str, recipe: Recipe, run: Run, notes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a record that says how the recipe made `artifact` from its source."""
    source = load_record(recipe.source)
    return {
        "artifact": artifact,
        "lineage": [*source["lineage"], artifact],
        "recipes": {**source["recipes"], artifact: recipe.model_dump(mode="json")},
        "base": source["base"],
        "texts": {**source.get("texts", {}), **_texts(recipe)},
        "notes": {**source.get("notes", {}), **({artifact: dict(notes)} if notes else {})},
        "numerics": run.arithmetic(),
    }


def _texts(recipe: Recipe) -> dict[str, str]:
    """Return the source of each data set that a recipe reads, by name."""
    names = [text.dataset for text in recipe.reads().values()]
    return {name: source_of(name) for name in names}


def finish_base(artifact: str, folder: Path, base: Mapping[str, Any]) -> PreTrainedModel:
    """Write the record of a downloaded checkpoint in `folder` and return the model.

    Args:
        base: where it comes from: name, source, hashes, `grid`.
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
    zeros: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Quantized] | None = None,
) -> dict[str, Any]:
    """Write a model that the recipe made in memory, and return its record.

    Args:
        zeros: positions that must be zero in the file, see `zero_masks`.
        notes: facts for the record, constant from run to run.
        quantized: codes of linears by full name, all packable and with the same scheme; they are written in
            place of the model's weights.

    Raises:
        Refusal: a parameter is NaN or infinite, or plain transformers does not load the checkpoint.
        AssertionError: a zero or a code was lost in writing.
    """
    from safetensors.torch import load_file

    from stages.model.packed import config_of, tensors_of, weight_from

    codes = quantized or {}
    scheme = next(iter(codes.values())).scheme() if codes else None
    check_finite(artifact, model.named_parameters())
    with writing(MODELS / artifact) as folder:
        model.config.__dict__.pop("quantization_config", None)
        tensors = model.state_dict()
        for linear, code in codes.items():
            del tensors[f"{linear}.weight"]
            tensors |= tensors_of(linear, code)
        names = [as_stored(model, tensors, packed=packed).keys() for packed in (False, bool(codes))]
        model.save_pretrained(folder, state_dict=tensors, save_original_format=names[0] == names[1])
        if codes:
            config_of(model, codes.keys(), scheme).save_pretrained(folder)
        load_tokenizer(recipe.source).save_pretrained(folder)
        if zeros or codes:
            stored = _written(folder, model, [*(zeros or {}), *codes], load_file)
            check_zeros(zeros or {}, lambda name: weight_from(stored, f"{name}.weight", scheme))
            check_codes(codes, lambda name: weight_from(stored, f"{name}.weight", scheme))
        check_loads(artifact, folder)
        layout = scheme["format"] if scheme else "dense"
        return _finish(folder, model, {**lineage(artifact, recipe, run, notes), "layout": layout}, codes)


def _written(
    folder: Path, model: PreTrainedModel, needed: Iterable[str], load: Callable[[Path], dict[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Return the tensors in a folder's files by their names in the model.

    If the files hold the weights of `needed` linears, by full name, in parts or several in one, the
    checkpoint is loaded instead.
    """
    in_model = naming(model)
    stored = [item for file in sorted(folder.glob("*.safetensors")) for item in load(file).items()]
    named = [(*in_model(key), tensor) for key, tensor in stored]
    tensors = {name: tensor for name, converted, tensor in named if not converted}
    if any(not {f"{name}.weight", f"{name}.weight_scale"} & tensors.keys() for name in needed):
        return pretrained(folder.name, folder, dtype="auto").state_dict()
    return tensors


def _finish(
    folder: Path,
    model: PreTrainedModel,
    record: dict[str, Any],
    codes: Mapping[str, Quantized] | None = None,
) -> dict[str, Any]:
    """Add the layout and the sizes to a record, write it, and return it."""
    record = {"layout": "dense", **record, **sizes_of(model, codes), "bytes_on_disk": bytes_on_disk(folder)}
    write_record(folder, record)
    return record


def zero_masks(linears: Iterable[Linear]) -> dict[str, Tensor]:
    """Return where each linear's weight is exactly zero, bool, shaped as stored, by the linear's name."""
    return {linear.name: linear.module.get_parameter("weight").data == 0 for linear in linears}


def check_zeros(masks: Mapping[str, Tensor], stored: Callable[[str], Tensor]) -> None:
    """Check that every position of `masks` is zero in the written weights.

    Args:
        stored: returns a linear's weight as it is written, by the linear's full name, on any device.

    Raises:
        AssertionError: a zero was lost; a bug, never a user's mistake.
    """
    for name, mask in masks.items():
        weight = stored(name)
        if lost := int(weight.logical_and(mask.to(weight.device)).sum()):
            raise AssertionError(f"{name}: {lost} of {int(mask.sum())} zeros were lost in writing")


def check_codes(codes: Mapping[str, Quantized], stored: Callable[[str], Tensor]) -> None:
    """Check that linears, as they are written, are what their codes stand for.

    Args:
        stored: returns a linear's weight as it is written, by the linear's full name, on the CPU.

    Raises:
        AssertionError: a code was changed in writing; a bug, never a user's mistake.
    """
    for name, code in codes.items():
        if not torch.equal(stored(name), code.dequantize().cpu()):
            raise AssertionError(f"{name}: the codes on disk differ from those computed")

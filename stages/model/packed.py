"""Quantized checkpoints in the formats of compressed-tensors.

Codes are packed without gaps, so the file is as small as it claims, and plain `from_pretrained` and the
serving engines read it. The library is given codes rather than weights, because quantizing again from bf16
weights would change some of them. Dense weights are written, and the record says `fake_quantized`, if the
library would silently skip a module (GPT-2's Conv1D), could not load the checkpoint (Falcon), or has no
format for the codes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from stages.core.lazy import torch
from stages.model.floats import Float8, MXFloat4, NVFloat4
from stages.model.grid import Codes, Int8, Quantized

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

Scheme = Mapping[str, Any]
"""How all packed linears of a checkpoint are stored, see `Quantized.scheme`."""
FORMATS: dict[str, type[Quantized]] = {
    "pack-quantized": Codes,
    "int-quantized": Int8,
    "float-quantized": Float8,
    "naive-quantized": Float8,
    "mxfp4-pack-quantized": MXFloat4,
    "nvfp4-pack-quantized": NVFloat4,
}
"""The class that reads each format."""


def scheme_of(config: Any) -> Scheme | None:
    """Read from a checkpoint's config how its linears are stored; None if they are dense."""
    stored = getattr(config, "quantization_config", None)
    return stored and {**stored["config_groups"]["group_0"], "format": stored["format"]}


def packable(module: nn.Module, code: Quantized) -> bool:
    """Tell whether a format holds the codes of this module and plain `from_pretrained` reads them.

    compressed-tensors fails on 4-bit zero points of several groups of at most 8 outputs, one word per group.
    """
    unreadable = (
        isinstance(code, Codes) and code.zero_point is not None and code.bits == 4
        and len(code.codes) <= 8 and code.scale.shape[1] > 1
    )  # fmt: skip
    return isinstance(module, torch.nn.Linear) and code.scheme() is not None and not unreadable


def loads_packed(model: PreTrainedModel, linears: Collection[str]) -> bool:
    """Tell whether plain `from_pretrained` loads `model` with these linears, by full name, packed.

    Loading calls the family's `_init_weights`. Some of these (Falcon, GPT-BigCode) read the weights of
    linears, which packed linears do not have.

    Args:
        model: is copied, so pass one on the meta device.
    """
    bare = copy.deepcopy(model)
    for name in linears:
        del bare.get_submodule(name)._parameters["weight"]
    try:
        for name in dict.fromkeys([*linears, *(name.rpartition(".")[0] for name in linears)]):
            bare._init_weights(bare.get_submodule(name))
    except AttributeError:
        return False
    return True


def tensors_of(linear: str, code: Quantized) -> dict[str, Tensor]:
    """Return the stored tensors of a quantized linear, by full name."""
    return {f"{linear}.{suffix}": tensor for suffix, tensor in code.tensors().items()}


def weight_from(stored: Mapping[str, Tensor], name: str, scheme: Scheme | None) -> Tensor:
    """Read the parameter `name` from a file's tensors, dequantized if it is stored on a grid.

    Raises:
        KeyError: the file has no such parameter.
    """
    if scheme is None or f"{name}_scale" not in stored:
        return stored[name]
    return code_from(stored, name, scheme).dequantize()


def code_from(stored: Mapping[str, Tensor], name: str, scheme: Scheme) -> Quantized:
    """Read the codes of the parameter `name` (`<linear>.weight`) from a file's tensors."""
    return FORMATS[scheme["format"]].read(stored, name, scheme)


def config_of(model: PreTrainedModel, quantized: Collection[str], scheme: Scheme | None) -> PreTrainedConfig:
    """Return a copy of the model's config that says how the linears named `quantized` are stored."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if not quantized or scheme is None:
        return config
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    args = {key: scheme[key] for key in ("weights", "input_activations")}
    group = QuantizationScheme(
        targets=["Linear"], **{key: value and QuantizationArgs(**value) for key, value in args.items()}
    )
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    stored = QuantizationConfig(
        config_groups={"group_0": group},
        ignore=[name for name in names if name not in quantized],
        format=scheme["format"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    config.quantization_config = json.loads(stored.model_dump_json())
    if scheme.get("dequantize"):
        config.quantization_config["dequantize"] = True
    return config

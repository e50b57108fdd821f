"""Quantized checkpoints in the formats of compressed-tensors.

Codes are packed without gaps, so the file is as small as it claims, and plain `from_pretrained` and the
serving engines read it. Codes are handed over rather than weights: letting the library quantize again
from bf16 weights changes some of them. What the library would skip without a word (GPT-2's Conv1D), what
could not be loaded (Falcon), or no format of it can hold, is written as dense weights, and the record says
`fake_quantized`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from stages.core.lazy import torch
from stages.model.floats import MXFP4, NVFP4, Float8
from stages.model.grid import Codes, Int8, Quantized

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

Scheme = Mapping[str, Any]
"""What `Quantized.scheme` says of all the linears of a checkpoint."""
FORMATS: dict[str, type[Quantized]] = {
    "pack-quantized": Codes,
    "int-quantized": Int8,
    "float-quantized": Float8,
    "naive-quantized": Float8,
    "mxfp4-pack-quantized": MXFP4,
    "nvfp4-pack-quantized": NVFP4,
}
"""What reads each format that `Quantized.scheme` may name."""


def scheme_of(config: Any) -> Scheme | None:
    """How a checkpoint's `config` says its linears are stored; None where they are dense."""
    stored = getattr(config, "quantization_config", None)
    return stored and {**stored["config_groups"]["group_0"], "format": stored["format"]}


def packable(module: nn.Module, code: Quantized) -> bool:
    """Whether a format holds the codes of this module, and plain `from_pretrained` reads them.

    Its library fails on 4-bit zero points of at most 8 outputs and several groups: one word a group.
    """
    unread = (
        isinstance(code, Codes) and code.zero_point is not None and code.bits == 4
        and len(code.codes) <= 8 and code.scale.shape[1] > 1
    )  # fmt: skip
    return isinstance(module, torch.nn.Linear) and code.scheme() is not None and not unread


def loads_packed(model: PreTrainedModel, linears: Collection[str]) -> bool:
    """Whether plain `from_pretrained` loads `model` when these linears of it, by full name, are packed.

    Loading calls the family's `_init_weights`, and that of some (Falcon, GPT-BigCode) reads weights of
    linears, which packed ones do not have.

    Args:
        model: is copied; take one on the meta device.
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
    """What a file holds of a quantized linear, by full name."""
    return {f"{linear}.{suffix}": tensor for suffix, tensor in code.tensors().items()}


def weight_from(stored: Mapping[str, Tensor], name: str, scheme: Scheme | None) -> Tensor:
    """The parameter `name` as a file's tensors have it, dequantized where it is stored on a grid.

    Raises:
        KeyError: the file has no such parameter.
    """
    if scheme is None or f"{name}_scale" not in stored:
        return stored[name]
    return code_from(stored, name, scheme).dequantize()


def code_from(stored: Mapping[str, Tensor], name: str, scheme: Scheme) -> Quantized:
    """The parameter `name` (`<linear>.weight`) that a file's tensors hold on a grid.

    Args:
        scheme: with `format` and `weights`, as `Quantized.scheme` gives them.
    """
    return FORMATS[scheme["format"]].read(stored, name, scheme)


def described(model: PreTrainedModel, quantized: Collection[str], scheme: Scheme | None) -> PreTrainedConfig:
    """The model's config, saying how the linears named `quantized` are stored."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if not quantized or scheme is None:
        return config
    args = {key: scheme[key] for key in ("weights", "input_activations")}
    group = QuantizationScheme(
        targets=["Linear"], **{key: value and QuantizationArgs(**value) for key, value in args.items()}
    )
    left = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    stored = QuantizationConfig(
        config_groups={"group_0": group},
        ignore=[name for name in left if name not in quantized],
        format=scheme["format"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    config.quantization_config = json.loads(stored.model_dump_json())
    if scheme.get("dequantize"):
        config.quantization_config["dequantize"] = True
    return config

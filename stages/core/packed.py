"""Quantized checkpoints in the formats of compressed-tensors.

Codes are packed without gaps, so the file is as small as it claims, and plain `from_pretrained` and the
serving engines read it. Codes are handed over rather than weights: letting the library quantize again
from bf16 weights changes some of them. What the library would skip without a word (GPT-2's Conv1D), or no
format of it can hold, is written as dense weights, and the record says `fake_quantized`.
"""

import copy
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor, nn

from stages.core.grid import Quantized, dequantize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Scheme = Mapping[str, Any]
"""What `Quantized.scheme` says of all the linears of a checkpoint."""


def packable(module: nn.Module, code: Quantized) -> bool:
    """Whether a format holds the codes of this module."""
    return isinstance(module, nn.Linear) and code.scheme() is not None


def tensors_of(linear: str, code: Quantized) -> dict[str, Tensor]:
    """What a file holds of a quantized linear, by full name."""
    return {f"{linear}.{suffix}": tensor for suffix, tensor in code.tensors().items()}


def weight_from(stored: Mapping[str, Tensor], name: str, scheme: Scheme | None) -> Tensor:
    """The parameter `name` as a file's tensors have it, dequantized where it is stored packed.

    Raises:
        KeyError: the file has no such parameter.
    """
    if name in stored or scheme is None:
        return stored[name]
    return dequantize(
        read_codes(stored, name, scheme), stored[f"{name}_scale"], scheme["weights"]["group_size"]
    )


def read_codes(stored: Mapping[str, Tensor], name: str, scheme: Scheme) -> Tensor:
    """The int8 codes `[out, in]` of the packed weight `name`."""
    shape = torch.Size(stored[f"{name}_shape"].tolist())
    codes: Tensor = unpack_from_int32(stored[f"{name}_packed"], scheme["weights"]["num_bits"], shape)
    return codes


def described(
    model: "PreTrainedModel", quantized: Collection[str], scheme: Scheme | None
) -> "PreTrainedConfig":
    """The model's config, saying how the linears named `quantized` are stored."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if not quantized or scheme is None:
        return config
    args = {key: scheme[key] for key in ("weights", "input_activations")}
    group = QuantizationScheme(
        targets=["Linear"], **{key: value and QuantizationArgs(**value) for key, value in args.items()}
    )
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stored = QuantizationConfig(
        config_groups={"group_0": group},
        ignore=[name for name in left if name not in quantized],
        format=scheme["format"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    config.quantization_config = json.loads(stored.model_dump_json())
    return config

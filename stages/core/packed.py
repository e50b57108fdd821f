"""Quantized checkpoints in compressed-tensors' `pack-quantized` format.

Codes of `bits` bits are packed without gaps into int32 words, so the file is as small as it claims, and
plain `from_pretrained` and the serving engines read it. The writer here hands over codes rather than
weights: letting the library quantize again from bf16 weights changes some of them.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.core.grid import Codes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_packed(model: "PreTrainedModel", codes: Mapping[str, Codes], folder: Path) -> None:
    """Write `model` into `folder` with the linears that `codes` names packed, the rest as they are.

    Raises:
        AssertionError: what was read back from the file is not what was computed.
    """
    first = next(iter(codes.values()))
    strategy = QuantizationStrategy.CHANNEL if first.group_size is None else QuantizationStrategy.GROUP
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=first.bits,
            type=QuantizationType.INT,
            symmetric=True,
            strategy=strategy,
            group_size=first.group_size,
        ),
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=[
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in codes
        ],
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    dense = {name for name, _ in model.named_parameters()} | {
        name for name, _ in model.named_buffers() if name in model.state_dict()
    }
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name in dense and name.removesuffix(".weight") not in codes
    }
    for name, code in codes.items():
        tensors[f"{name}.weight_packed"] = pack_to_int32(code.codes.cpu(), code.bits).contiguous()
        tensors[f"{name}.weight_scale"] = code.scale.cpu().contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(code.codes.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    described = copy.deepcopy(model.config)
    described.architectures = [type(model).__name__]
    described.quantization_config = json.loads(config.model_dump_json())
    described.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)

    with safe_open(folder / "model.safetensors", "pt") as handle:
        for name, code in codes.items():
            if not torch.equal(read_codes(handle, name, folder), code.codes.cpu()):
                raise AssertionError(f"{name}: the codes on disk are not those computed")


def read_codes(handle: Any, name: str, folder: Path) -> Tensor:
    """The int8 codes `[out, in]` of linear `name` in an open safetensors file of `folder`."""
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    shape = torch.Size(handle.get_tensor(f"{name}.weight_shape").tolist())
    codes: Tensor = unpack_from_int32(
        handle.get_tensor(f"{name}.weight_packed"), group["weights"]["num_bits"], shape
    )
    return codes

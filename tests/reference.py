"""What an artifact of each method computes, from plain models and the bits of its files.

Nothing of the stages is used: packed weights are read bit by bit, zeros are put into the source, and removed
parts are switched off in it. The artifact, as transformers loads it, must give the same logits.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
TOKENS = torch.arange(48).view(2, 24) * 5 % 250
"""What the logits are compared on."""
E4M3_MAX = 448.0


def stream(words: Tensor, bits: int, count: int) -> np.ndarray:
    """Read `count` codes of `bits` bits from each row of `words`, from the lowest bit on: `[rows, count]`."""
    row = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=1, bitorder="little")
    codes = row[:, : count * bits].reshape(len(row), count, bits)
    return (codes.astype(np.int64) << np.arange(bits)).sum(2)


def e4m3(numbers: Tensor) -> np.ndarray:
    """Decode bytes of one sign, four exponent and three mantissa bits: fp32."""
    code = numbers.view(torch.uint8).numpy().astype(np.int64)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    size = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    return np.where(code >> 7, -size, size).astype(np.float32)


def decoded(stored: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    """Decode the weight of the linear `name` from a file's tensors, in the dtype it stands for."""
    form, bits = config["format"], config["config_groups"]["group_0"]["weights"]["num_bits"]
    scale = stored[f"{name}.weight_scale"]
    factor, dtype = scale, scale.dtype
    if form == "pack-quantized":
        rows, width = stored[f"{name}.weight_shape"].tolist()
        codes = stream(stored[f"{name}.weight_packed"], bits, width) - 2 ** (bits - 1)
        if (zero := stored.get(f"{name}.weight_zero_point")) is not None:
            zeros = stream(zero.T.contiguous(), bits, rows).T - 2 ** (bits - 1)
            codes = codes - zeros.repeat(width // zeros.shape[1], 1)
    elif form == "int-quantized":
        codes = stored[f"{name}.weight"].numpy().astype(np.int64)
    elif form in ("naive-quantized", "float-quantized"):
        codes = e4m3(stored[f"{name}.weight"])
    else:
        packed, dtype = stored[f"{name}.weight_packed"].numpy(), torch.bfloat16
        codes = E2M1[np.stack([packed & 15, packed >> 4], 2).reshape(len(packed), -1)]
        if form.startswith("mxfp4"):
            factor = torch.from_numpy(np.float32(2) ** (scale.numpy().astype(np.float32) - 127))
        else:
            factor = torch.from_numpy(e4m3(scale)) / stored[f"{name}.weight_global_scale"]
    by_column = factor.float().numpy().repeat(codes.shape[1] // factor.shape[1], 1)
    return torch.from_numpy(codes.astype(np.float32) * by_column).to(dtype)


def plain(folder: Path, place: Path) -> nn.Module:
    """Load the checkpoint in `folder`; if it is packed, from a dense copy in `place`."""
    config = json.loads((folder / "config.json").read_text())
    packing = config.pop("quantization_config", None)
    if packing is None:
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    packed = [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]
    written = {f"{name}.weight": decoded(stored, name, packing) for name in packed}
    rest = {key: t for key, t in stored.items() if not key.startswith(tuple(f"{n}.weight" for n in packed))}
    place.mkdir()
    save_file(rest | written, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(place).eval()


def inner(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all linears in lists of blocks, by full name."""
    return {
        f"{name}.weight": module.get_parameter("weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)
    }


def masked(base: nn.Module, read: nn.Module, notes: dict[str, Any]) -> None:
    """Put the zeros of the artifact into its source."""
    for name, weight in inner(base).items():
        weight.data[read.get_parameter(name) == 0] = 0


def replaced(base: nn.Module, read: nn.Module, notes: dict[str, Any]) -> None:
    """Take the weights of linears from the artifact, and all else from its source."""
    for name, weight in inner(base).items():
        weight.data = read.get_parameter(name).data.to(weight.dtype)


def taken(base: nn.Module, read: nn.Module, notes: dict[str, Any]) -> None:
    """Take everything from the artifact."""
    base.load_state_dict(read.state_dict())


def coarse(inputs: Tensor, top: float) -> Tensor:
    """Round `[..., tokens, in]` to 8 bits with a scale per token, or one for all in a matrix of tokens."""
    peak = inputs.abs().amax(-1, keepdim=True) if inputs.ndim > 2 else inputs.abs().max()
    scale = peak / top
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    steps = inputs / scale
    if top == E4M3_MAX:
        return steps.clamp(-top, top).to(torch.float8_e4m3fn).to(inputs.dtype) * scale
    return steps.round().clamp(-128, 127) * scale


def rounded(base: nn.Module, read: nn.Module, notes: dict[str, Any], *, top: float) -> None:
    """Take weights and norms from the artifact, and round the inputs of its linears to 8 bits."""
    taken(base, read, notes)
    for name in inner(base):
        linear = base.get_submodule(name.removesuffix(".weight"))
        linear.register_forward_pre_hook(lambda _, args: (coarse(args[0], top),))


def switched_off(base: nn.Module, read: nn.Module, notes: dict[str, Any]) -> None:
    """Zero the columns that read a removed neuron or head; what is left keeps its order."""
    off = 0
    for name, weight in inner(base).items():
        dim = 0 if isinstance(base.get_submodule(name.removesuffix(".weight")), Conv1D) else 1
        before, after = weight.movedim(dim, 0), read.get_parameter(name).movedim(dim, 0)
        if len(before) == len(after):
            continue
        left = iter(after)
        wanted = next(left)
        for column in before:
            if wanted is not None and torch.equal(column, wanted):
                wanted = next(left, None)
            else:
                column.data.zero_()
                off += 1
        assert wanted is None, f"{name} has columns that its source does not have"
    assert off


def bypassed(base: nn.Module, read: nn.Module, notes: dict[str, Any]) -> None:
    """Let removed blocks return what they are given."""
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList)]
    longest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    for number in notes["removed"]:
        longest[number].register_forward_hook(_same, with_kwargs=True)


def _same(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


Changed = Callable[[nn.Module, nn.Module, dict[str, Any]], None]
CHANGES: dict[str, Changed] = {
    **dict.fromkeys(("magnitude", "wanda", "random", "stepwise", "resp"), masked),
    **dict.fromkeys(("width", "heads", "resp-structures"), switched_off),
    "depth": bypassed,
    **dict.fromkeys(("sparsegpt", "rtn", "gptq", "hqq", "nf4", "fp8", "mxfp4", "nvfp4"), replaced),
    **dict.fromkeys(("lora", "qat", "eco"), replaced),
    **dict.fromkeys(("awq", "full"), taken),
    "smoothquant": partial(rounded, top=127.5),
    "fp8 with activations": partial(rounded, top=E4M3_MAX),
}
"""How a plain model of the source becomes what a method should have made of it, by the method's name."""


def logits(model: nn.Module) -> Tensor:
    """Compute the logits `[2, 24, tokens]` in fp32 without a cache."""
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()

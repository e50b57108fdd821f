"""An artifact as one GGUF file, for llama.cpp and what is built on it.

Packed linears keep their codes (`flows.exporting.ggml_types`), all else its floats. What GGUF cannot say
as the checkpoint does is refused by name: another family, kind of rotary embedding or grid.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType, RopeScalingType, get_tensor_name_map
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open

from flows.exporting.ggml_types import Stored, Unfit, packed, plain
from flows.exporting.ggml_vocabulary import write_vocabulary
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.reading import reading
from stages.model.packed import Scheme, code_from, scheme_of

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""llama.cpp's name of each family that is served."""
_INTERLEAVED = ("llama", "mistral")
"""Families whose rotary pairs llama.cpp keeps side by side, not half a head apart."""
_FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}

Parameter: TypeAlias = "tuple[str, Callable[[Tensor | None], Stored]]"
"""A name, and a function that reads the tensor with its outputs in a given order."""


@dataclass(frozen=True)
class Written:
    """What a GGUF file holds."""

    matrices: Mapping[str, int]
    """How many matrices have each ggml type, by its name."""
    rounding: float
    """The largest error of a group's minimum in units of its step, from fp16; 0 where there is none."""
    size: int
    """Bytes."""


def write_gguf(artifact: str, folder: Path, file: Path, store: Callable[[Tensor], Stored] = plain) -> Written:
    """Write a checkpoint as GGUF.

    Args:
        artifact: its name, for the file's metadata and for refusals.
        folder: of the checkpoint; only read.
        file: to write; nothing is there if the writing fails.
        store: how to store a tensor that lies on no grid.

    Raises:
        Refusal: GGUF cannot hold this checkpoint as it is; all matrices that do not fit are named.
    """
    from transformers import AutoConfig

    with reading(f"the config of {artifact}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check(config, artifact)
    unfinished = file.with_name(f".{file.name}.part")
    arch = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(unfinished, MODEL_ARCH_NAMES[arch], use_temp_file=True)
    try:
        _write_settings(writer, config, artifact)
        kinds, rounding = _write_tensors(
            writer, config, _parameters(folder, scheme_of(config), artifact, store), artifact
        )
        write_vocabulary(writer, folder, config.vocab_size, artifact)
        writer.add_file_type(_FILE_TYPES[kinds.most_common(1)[0][0]])
        writer.add_quantization_version(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.replace(file)
    finally:
        if writer.temp_file:
            writer.temp_file.close()
        unfinished.unlink(missing_ok=True)
    return Written({kind.name: count for kind, count in kinds.items()}, rounding, file.stat().st_size)


def _check(config: Any, artifact: str) -> None:
    """Refuse what llama.cpp would compute in another way, all of it at once."""
    if config.model_type not in ARCHITECTURES:
        raise Refusal(
            f"{artifact} is {config.model_type}, but only {', '.join(ARCHITECTURES)} are written to GGUF; "
            "use --to hf and llama.cpp's own converter."
        )
    rope = config.rope_parameters
    wrong = []
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        wrong.append(f"rotary embeddings of type {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"rotary embeddings of {rope['partial_rotary_factor']:.0%} of a head")
    if config.hidden_act != "silu":
        wrong.append(f"the activation {config.hidden_act}")
    if wrong:
        raise Refusal(f"{artifact} has {' and '.join(wrong)}, which are not written to GGUF; use --to hf.")


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_settings(writer: GGUFWriter, config: Any, artifact: str) -> None:
    """Add what the config says, in llama.cpp's fields."""
    window = getattr(config, "sliding_window", None) or math.inf
    if not getattr(config, "use_sliding_window", True):
        window = math.inf
    head, rope = _head_size(config), config.rope_parameters
    writer.add_name(artifact)
    # Beyond its window a model with a sliding one attends to less, which llama.cpp would not.
    writer.add_context_length(int(min(config.max_position_embeddings, window)))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(config: Any) -> np.ndarray[Any, Any]:
    """Return by what Llama 3.1 divides each rotary frequency, fp32 `[head / 2]`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head, rope = _head_size(config), config.rope_parameters
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    unscaled = rope["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors: np.ndarray[Any, Any] = (unscaled / scaled.double()).float().numpy()
    return factors


def _write_tensors(
    writer: GGUFWriter, config: Any, parameters: Iterator[Parameter], artifact: str
) -> tuple[Counter[Kind], float]:
    """Add all tensors; return the types of the matrices and the largest rounding of a minimum."""
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    kinds, rounding, unfit = Counter[Kind](), 0.0, []
    for name, read in parameters:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            unfit.append(f"{name} (llama.cpp has no such tensor in {config.model_type})")
            continue
        try:
            stored = read(_order(name, config))
        except Unfit as reason:
            unfit.append(f"{name} ({reason})")
            continue
        if unfit:
            continue
        writer.add_tensor(target, stored.data, raw_dtype=stored.kind)
        rounding = max(rounding, stored.rounding)
        if stored.data.ndim > 1:
            kinds[stored.kind] += 1
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    if unfit:
        more = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
        raise Refusal(
            f"{artifact} does not fit into GGUF without rounding again: {'; '.join(unfit[:4])}{more}. "
            "Quantize to symmetric 4 or 8 bits, or asymmetric 4, in groups that 32 divides, or use --to hf."
        )
    return kinds, rounding


def _order(name: str, config: Any) -> Tensor | None:
    """Return the order of outputs that llama.cpp's rotary embedding expects, None if it is theirs."""
    part = name.rsplit(".", 2)[-2] if "." in name else ""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if config.model_type not in _INTERLEAVED or heads is None:
        return None
    size = _head_size(config)
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def _parameters(
    folder: Path, scheme: Scheme | None, artifact: str, store: Callable[[Tensor], Stored]
) -> Iterator[Parameter]:
    """Yield each parameter's name with a function that reads it, its outputs in a given order."""
    with ExitStack() as opened, reading(artifact):
        files = [opened.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        linears: dict[str, list[str]] = {
            name.removesuffix(".weight_scale"): [] for name in sorted(where) if name.endswith(".weight_scale")
        }
        for name in sorted(where):
            linear, _, kind = name.rpartition(".")
            if linear in linears and kind.startswith("weight"):
                linears[linear].append(name)
            else:
                yield name, partial(_dense, where[name], name, store)
        for linear, names in linears.items():
            yield f"{linear}.weight", partial(_packed, {name: where[name] for name in names}, linear, scheme)


def _dense(file: Any, name: str, store: Callable[[Tensor], Stored], order: Tensor | None) -> Stored:
    tensor = file.get_tensor(name)
    return store(tensor if order is None else tensor[order])


def _packed(files: Mapping[str, Any], linear: str, scheme: Scheme | None, order: Tensor | None) -> Stored:
    if scheme is None:
        raise Unfit("it has scales that its config does not describe")
    if scheme.get("input_activations"):
        raise Unfit("its inputs are rounded too, which GGUF cannot say")
    tensors = {name: file.get_tensor(name) for name, file in files.items()}
    return packed(code_from(tensors, f"{linear}.weight", scheme), order)

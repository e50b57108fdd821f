"""GGUF files of a tiny Llama."""

from pathlib import Path

import gguf
import numpy as np


def write_model(
    path: Path, kind: gguf.GGMLQuantizationType | None = None, splitter: str = "gpt-2"
) -> dict[str, np.ndarray]:
    """Write a Llama of one block with a tokenizer of eight tokens; return its tensors by their GGUF names.

    Args:
        kind: the type of its matrices; None writes floats.
        splitter: llama.cpp's name for how text is split.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "rope_dimension_count": 8, "vocab_size": 8, "tokenizer_model": "gpt2", "tokenizer_pre": splitter,
        "token_list": ["<s>", "</s>", "a", "b", "c", "d", "ab", "cd"], "token_types": [3, 3] + [1] * 6,
        "token_merges": ["a b", "c d"], "bos_token_id": 0, "eos_token_id": 1,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (8, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    tensors = {name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    for name, values in tensors.items():
        packed = gguf.quants.quantize(values.astype(np.float32), kind) if kind and values.ndim > 1 else values
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind if packed is not values else None)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return tensors

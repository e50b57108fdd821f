"""Tiny models of families that generate, in float32: all ways to place tokens and to keep those read."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests import families

_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_PLAIN = {
    "vocab_size": families.VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, **_IDS,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_GPT = {"vocab_size": families.VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **_IDS}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_IDS}
_FALCON |= {"vocab_size": families.VOCAB}
CONFIGS: dict[str, dict[str, Any]] = {
    "mpt": {
        "vocab_size": families.VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2,
        **_IDS,
    },
    "gpt_neo": {
        "vocab_size": families.VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256, **_IDS,
    },
    "mamba": {
        "vocab_size": families.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **_IDS,
    },
    "qwen3_5_text": _PLAIN | _DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": _PLAIN | {"attention_window_size": 16, "lru_width": 32, "num_hidden_layers": 3},
    "bloom": {"vocab_size": families.VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS},
    "falcon": _FALCON | {"alibi": False},
    "falcon with alibi": _FALCON | {"alibi": True},
    "falcon_h1": _PLAIN | {"mamba_d_ssm": 32, **_MAMBA, "mamba_n_heads": 4},
    "falcon_mamba": {
        "vocab_size": families.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **_IDS,
    },
    "gemma2": _PLAIN | {"sliding_window": 16},
    "gemma4_text": _PLAIN | {
        "global_head_dim": 8, "vocab_size_per_layer_input": families.VOCAB, "num_hidden_layers": 4,
        "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "git": _PLAIN | {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
    },
    "gpt_bigcode": _GPT,
    "gpt_oss": _PLAIN | _EXPERTS | {"sliding_window": 16},
    "gptj": _GPT | {"rotary_dim": 8},
    "granitemoehybrid": _PLAIN | _EXPERTS | _MAMBA | {
        "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"],
    },
    "lfm2": _PLAIN | {"layer_types": ["conv", "full_attention"]},
    "llama4_text": _PLAIN | {
        "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 16,
    },
    "mamba2": {
        "vocab_size": families.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
        "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8, **_IDS,
    },
    "minimax": _PLAIN | _EXPERTS | {"block_size": 8},
    "mistral with a window": _PLAIN | {"sliding_window": 16},
    "moshi": _PLAIN | {"sliding_window": 64, "ffn_dim": 64},
    "openai-gpt": {key: value for key, value in _GPT.items() if key not in _IDS},
    "phi": _PLAIN,
    "phi3": {key: value for key, value in _PLAIN.items() if key != "head_dim"} | {
        "original_max_position_embeddings": 20,  # some prompts of the tests reach it in their answers
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    },
    "qwen2": _PLAIN | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "rwkv": {
        "vocab_size": families.VOCAB, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2,
        "context_length": 256, "rescale_every": 1, **_IDS,
    },
    "stablelm": _PLAIN,
}  # fmt: skip
"""Further families than `tests.families` has; the part of a name before a space is the `model_type`."""
NAMES = tuple(families.CONFIGS) + tuple(CONFIGS)


def model(name: str) -> PreTrainedModel:
    """Make a model whose blocks weigh enough for an answer to depend on the place of each token."""
    torch.manual_seed(0)
    config = families.CONFIGS.get(name) or AutoConfig.for_model(name.split()[0], **CONFIGS[name])
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter_name, parameter in made.named_parameters():
        if parameter.dim() == 2 and not any(
            part in parameter_name for part in ("A_log", "emb", "wte", "head")
        ):
            parameter.data.mul_(4)
    return made.to(families.DEVICE)

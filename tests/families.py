"""Tiny models of every served family with random weights, and a byte tokenizer for them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NemotronHConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

DEVICE = "cpu"
"""Where tests and their stages compute; `pytest --device cuda` sets it."""
VOCAB = 259
_GATED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GATED),
    "gemma3": Gemma3TextConfig(**_GATED, sliding_window=16),
    "mistral": MistralConfig(**_GATED),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32, **_IDS,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, **_IDS,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **_IDS),
}  # fmt: skip
RARE: dict[str, PreTrainedConfig] = {
    # the last two blocks read the keys and values of the two before, from a mapping
    "gemma4": Gemma4TextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, hidden_size_per_layer_input=32,
        intermediate_size=64, num_hidden_layers=4, num_kv_shared_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, **_IDS,
    ),
    # its config has the size of heads by block, and raises when asked for one of all
    "gemma4_unified": Gemma4UnifiedTextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=16,
        layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2, **_IDS,
    ),
    # a multimodal wrapper, whose tensors on disk are named otherwise than its modules
    "gemma3_wrapper": Gemma3Config(
        text_config={**_GATED, "model_type": "gemma3_text", "sliding_window": 16},
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=255, boi_token_index=254, eoi_token_index=253, **_IDS,
    ),
    # positions have a row per head, or per window and head
    "mpt": MptConfig(
        vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=256, **_IDS
    ),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **_IDS),
}  # fmt: skip
"""Families that few methods' own tests need: their arguments or names differ from those of `CONFIGS`."""
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
RECURRENT: dict[str, PreTrainedConfig] = {
    "qwen3_5": Qwen3_5TextConfig(**_GATED, **_LINEAR_ATTENTION),
    "falcon_h1": FalconH1Config(
        **_GATED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16,
        mamba_chunk_size=16,
    ),
    "mamba": MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=32, **_IDS
    ),
    # a block is a Mamba, an MLP or an attention
    "nemotron_h": NemotronHConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, hybrid_override_pattern="M-M*-M",
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, ssm_state_size=16, mamba_num_heads=4,
        mamba_head_dim=16, n_groups=1, chunk_size=16, max_position_embeddings=256, **_IDS,
    ),
}  # fmt: skip
"""Families with convolutions in their blocks, which methods refuse unless `ignore` names these."""
CONVOLUTIONS = {
    "qwen3_5": ["linear_attn.conv1d.weight"], "falcon_h1": ["mamba.conv1d.weight"],
    "mamba": ["mixer.conv1d.weight", "mixer.A_log", "mixer.dt_proj"], "nemotron_h": ["mixer.conv1d.weight"],
}  # fmt: skip
"""What `ignore` names in these: convolutions, and a linear whose weight Mamba reads without calling it."""
ALL = {**CONFIGS, **RARE, **RECURRENT}
IN_FEATURES = {name: [32, 128] if name in ("gpt2", "bloom", "mpt") else [32, 64] for name in ALL}
_FIXED = {
    "width": "cannot lose neurons: its config has no setting", "heads": "cannot describe fewer heads",
    "resp-structures": "its config has no setting|cannot describe fewer heads",
}  # fmt: skip
REFUSALS: dict[str, dict[str, str]] = {
    "gemma4": {
        "width": "has 2 MLPs", "heads": "has 0 attentions", "resp-structures": "has 2 MLPs",
        "depth": "set of layer types producing a cache is different",
    },
    "gemma4_unified": dict.fromkeys(("heads", "resp-structures"), "the widths of its attentions differ"),
    "mpt": _FIXED,
    "bloom": _FIXED,
}  # fmt: skip
"""What the structure of `RARE` families makes methods refuse, and the words of the refusal."""
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
"""A mixture's matrices that are no linear's weight, as `ignore` names them."""
_GATED_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
GROUPS: dict[str, list[list[str]]] = {
    "llama": _GATED_GROUPS,
    "qwen3": _GATED_GROUPS,
    "gemma3": _GATED_GROUPS,
    "mistral": _GATED_GROUPS,
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
    "gpt_neox": [
        ["attention.query_key_value"],
        ["attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}
"""A block's linears by the tensor they read, in the order in which they compute."""


def model(family: str, seed: int = 0) -> PreTrainedModel:
    """Make a tiny model of `family` in bf16 on `DEVICE`, with weights drawn on the CPU from `seed`."""
    torch.manual_seed(seed)
    drawn = AutoModelForCausalLM.from_config({**ALL, **CONFIGS}[family], dtype=torch.bfloat16).eval()
    for module in drawn.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):  # some processors draw zeros of bf16
            module.weight.data.masked_fill_(module.weight == 0, 0.01)
    return drawn.to(DEVICE)


def wide(family: str) -> PreTrainedModel:
    """Make it in fp32, where the number of windows computed at once changes no more than the last digits."""
    return model(family).float()


def windows(count: int, length: int, seed: int = 0, high: int = 256) -> torch.Tensor:
    """Draw token ids below `high`, `[count, length]` on `DEVICE`."""
    drawn = torch.randint(0, high, (count, length), generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE)


def mixture(experts: int = 2) -> PreTrainedModel:
    """Make a two-block mixture in bf16, whose experts are 3-D parameters and no linears."""
    torch.manual_seed(0)
    config = MixtralConfig(**_GATED, num_local_experts=experts, num_experts_per_tok=1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(DEVICE)


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    by_bytes = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_bytes.decoder = decoders.ByteLevel()
    by_bytes.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=by_bytes,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=10**9,
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    return wrapped


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's checkpoint and tokenizer into `folder`."""
    model(family, seed).cpu().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

"""Tiny models of every family the walk serves, with random weights, and a byte tokenizer to go with them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

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
IN_FEATURES = {name: [32, 128] if name == "gpt2" else [32, 64] for name in CONFIGS}


def model(family: str, seed: int = 0) -> PreTrainedModel:
    """A two-block model of `family` in bf16, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.bfloat16).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=10**9
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    return wrapped


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's checkpoint and tokenizer into `folder`."""
    model(family, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

"""A tiny model whose embedding has fewer rows than its tokenizer has tokens."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stages.core.files import sha256
from stages.job.params import Params
from tests import families

ROWS = 200
"""The embedding's rows; letters have ids below it, a space and the special tokens above."""


def use(chosen: Params) -> Params:
    """Write such a model into the working folder and make it the base `tiny`; return the params."""
    settings = families.CONFIGS["llama"].to_dict() | {"vocab_size": ROWS}
    config = LlamaConfig(**settings | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("fewrows")
    families.tokenizer().save_pretrained("fewrows")
    source = {"source": "path:fewrows", "sha256": sha256(Path("fewrows"))}
    chosen.models["tiny"] = chosen.models["tiny"].model_copy(update=source)
    return chosen

"""Write a base artifact of random weights, a shard a block, so that no more than a block is in memory."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from stages.core.files import RECORD
from stages.model.blocks import blocks


def write_random(
    folder: Path, config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, device: str = "cpu"
) -> None:
    """Write a model of `config` with bf16 weights of standard deviation 0.02 and norms of 1 into `folder`.

    Args:
        device: where the weights are drawn; each draws others.
    """
    folder.mkdir(parents=True)
    draw = torch.Generator(device).manual_seed(0)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = [name for name, _ in blocks(model)]

    def weight(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return empty.normal_(0, 0.02, generator=draw).cpu()

    shards: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        block = next((block for block in names if name.startswith(f"{block}.")), "rest")
        shards[block][name] = parameter.shape
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weight(shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name = folder.name
    record = {"artifact": f"base/{name}", "lineage": [f"base/{name}"], "recipes": {}, "base": {"name": name}}
    (folder / RECORD).write_text(json.dumps(record))

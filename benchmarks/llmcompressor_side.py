"""The llm-compressor side of `benchmarks.compression`, run by an interpreter that has llm-compressor.

    python llmcompressor_side.py <model> <tokens.safetensors> <method> <pipeline> <output> <threads> <seed>

Prints {"seconds": ...}, the time of `oneshot` on a loaded model. Imports nothing from the project.
"""

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model_path, tokens_path, method, pipeline, folder, threads, seed = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(int(seed))
tokens = load_file(tokens_path)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
recipes = {
    "wanda": lambda: WandaPruningModifier(sparsity=0.5, mask_structure="0:0", ignore=["re:.*lm_head"]),
    "sparsegpt": lambda: SparseGPTModifier(
        sparsity=0.5, mask_structure="0:0", block_size=128, dampening_frac=0.01, ignore=["re:.*lm_head"]
    ),
    "gptq": lambda: GPTQModifier(
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64,
                },
            }
        },
        block_size=128,
        dampening_frac=0.01,
        actorder=None,
        ignore=["re:.*lm_head"],
    ),
}  # fmt: skip
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
start = time.perf_counter()
oneshot(
    model=model,
    dataset=data,
    recipe=recipes[method](),
    pipeline=pipeline,
    max_seq_length=tokens.shape[1],
    num_calibration_samples=len(tokens),
    shuffle_calibration_samples=True,
)
seconds = time.perf_counter() - start
model.save_pretrained(folder)
print(json.dumps({"seconds": seconds}))  # noqa: T201

"""A policy of step-wise pruning that a language model decides; see docs/policies.md.

    python sweeps/ask_model.py data/models/base/smollm2 < state.json > answer.json

The program reads the state of the work as JSON and writes an answer as JSON: the plain interface of
`policy: {kind: command}`. A small model cannot be trusted to write JSON, so it is asked one question a block,
and by how much it prefers " yes" to " no" ranks the blocks. Those it prefers most lose a share of their
weights, which halves after every step that was undone. Another model, or one behind an API, fits in the same
way.
"""

import json
import math
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STEP = 0.1
"""The share of its weights a chosen block loses at the first step."""
FRACTION = 0.5
"""The share of blocks chosen at a step."""
CAP = 0.9
"""The highest sparsity of a block."""
PATIENCE = 4
"""Undone steps after which it stops."""
EXAMPLES = """A part of a network can be pruned if its sensitivity is low and little of it is gone.
Sensitivity -2.1, gone 0.00. Prune it? yes
Sensitivity 2.4, gone 0.10. Prune it? no
Sensitivity -0.9, gone 0.20. Prune it? yes
Sensitivity 1.3, gone 0.50. Prune it? no
"""


def preference(model, tokenizer, prompt: str) -> float:
    """Return by how much the model prefers " yes" to " no" after `prompt`, in nats per token."""
    scores = []
    for answer in (" yes", " no"):
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False).input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(1)
        scores.append(float(logits.gather(1, ids[0, start:, None]).mean()))
    return scores[0] - scores[1]


def decide(state: dict, folder: str) -> dict:
    """Return the answer to a state, as a dictionary."""
    undone = sum(not step["kept"] for step in state["history"])
    free = [block for block in state["blocks"] if block["sparsity"] < CAP]
    if undone > PATIENCE or not free:
        return {"stop": f"{undone} steps were undone" if free else f"every block has lost {CAP}"}
    torch.set_num_threads(1)  # the number of threads can change the last bits
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    asked = {
        block["name"]: preference(
            model,
            tokenizer,
            f"{EXAMPLES}Sensitivity {block['wanda'] + block['gradient']:.1f}, gone {block['sparsity']:.2f}. "
            "Prune it?",
        )
        for block in free
    }
    chosen = sorted(asked, key=asked.__getitem__, reverse=True)
    chosen = chosen[: math.ceil(FRACTION * len(state["blocks"]))]
    lost = {block["name"]: block["sparsity"] for block in free}
    return {"prune": {name: min(STEP / 2**undone, CAP - lost[name]) for name in chosen}}


if __name__ == "__main__":
    json.dump(decide(json.load(sys.stdin), sys.argv[1]), sys.stdout)

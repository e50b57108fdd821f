"""The time of bf16 products on this processor, by torch's kernels and in fp32, over that of fp32 products.

    python -m benchmarks.half_products

The tasks are those of a model in the shape of SmolLM2-135M with random weights, one thread: a forward of 256
tokens, one token for each of 60 sequences, a training step on 64 tokens. Each line is a JSON object. Where
bf16 is slow, stages compute it in fp32; elsewhere by torch's kernels.
"""

import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.figures import tell
from stages.core import half_products

TURNS = 2


def seconds(task: Callable[[], object]) -> float:
    """Return the least time of a few turns; other processes can only add to it."""
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(model: PreTrainedModel) -> dict[str, float]:
    """Return the seconds of each task."""
    ids = torch.randint(model.config.vocab_size, (60, 256))
    with torch.inference_mode():
        times = {"forward": seconds(lambda: model(ids[:1]))}
        past = model(ids[:, :64], use_cache=True, logits_to_keep=1).past_key_values
        times["token"] = seconds(lambda: model(ids[:, 64:65], past_key_values=past, use_cache=True))

    def train() -> None:
        model.zero_grad()
        model(ids[:1, :64], labels=ids[:1, :64]).loss.backward()

    return {**times, "training step": seconds(train)}


def main() -> None:
    """Measure, and print a line a task."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fp32 = measure(model)
    bf16 = measure(model.to(torch.bfloat16))
    half_products.widen(["bfloat16"])
    widened = measure(model)
    tell("slow here", "bfloat16" in half_products.slow())
    for task, base in fp32.items():
        tell(f"{task}, fp32 seconds", base)
        tell(f"{task}, bf16 / fp32", bf16[task] / base)
        tell(f"{task}, bf16 in fp32 / fp32", widened[task] / base)


if __name__ == "__main__":
    main()

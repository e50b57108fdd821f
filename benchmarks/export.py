"""A GGUF export in llama.cpp, against transformers on the artifact itself.

    python -m pip install xllamacpp      # llama.cpp for Python; not in the lock files
    python -m benchmarks.export quantize/gptq-w4g64

Twenty prompts. llama.cpp answers each greedily from the exported file, and transformers from the artifact in
fp32. Beside them stands the spread of llama.cpp itself: the base's file in floats against the same file with
its matrices rounded to Q8_0. `export.answers_equal` counts equal answers of `--tokens` tokens, and
`export.log_probability_difference` is the mean over prompts of how far the ten likeliest first tokens are
apart, in nats. Both should be within the spread.

Each line is a JSON object. Without xllamacpp it says so and exits with 0.
"""

import argparse
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from benchmarks.figures import show, tell
from flows.exporting.ggml_file import write_gguf
from flows.exporting.ggml_types import PER_SCALE, Stored, plain
from stages.core.files import MODELS
from stages.core.lazy import torch
from stages.core.run import Run
from stages.model.artifact import load_model, load_record, load_tokenizer

PROMPTS = (
    "The capital of France is", "Water boils at", "2 + 2 =", "Once upon a time", "The opposite of hot is",
    "In 1969, people first", "My favourite food is", "The sun rises in the", "A triangle has",
    "To make tea, first", "The largest ocean is", "She opened the door and", "The colours of the rainbow are",
    "def add(a, b):",
    "The president said that", "Prices rose by", "The doctor told him to", "Rain is caused by",
    "The train left at", "Dear Sir or Madam,",
)  # fmt: skip
TOP = 10


class Answer(NamedTuple):
    """What one side gives for a prompt."""

    tokens: tuple[int, ...]
    first: Mapping[int, float]
    """Log probabilities of the likeliest first tokens, nats."""


def by_llama(file: Path, tokens: int) -> list[Answer]:
    """Answer all prompts by llama.cpp."""
    import xllamacpp  # type: ignore[import-not-found]

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    server = xllamacpp.Server(params)
    answers = []
    for prompt in PROMPTS:
        asked = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "n_probs": 2 * TOP,
            "ignore_eos": True,
        }
        steps = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        first = {each["id"]: each["logprob"] for each in steps[0]["top_logprobs"]}
        answers.append(Answer(tuple(step["id"] for step in steps), first))
    return answers


def by_transformers(artifact: str, tokens: int) -> list[Answer]:
    """Answer all prompts by transformers, in fp32."""
    run = Run(device="cpu", dtype="float32", threads=2, seed=0, numerics="fast")
    run.start()
    model, tokenizer = load_model(artifact, run, dequantize=True), load_tokenizer(artifact)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        taken: list[int] = []
        first: dict[int, float] = {}
        for _ in range(tokens):
            with torch.inference_mode():
                logits = model(torch.cat([ids, torch.tensor([taken], dtype=ids.dtype)], 1)).logits[0, -1]
            if not first:
                values, indices = logits.double().log_softmax(-1).topk(2 * TOP)
                first = dict(zip(indices.tolist(), values.tolist(), strict=True))
            taken.append(int(logits.argmax()))
        answers.append(Answer(tuple(taken), first))
    return answers


def compare(ours: list[Answer], theirs: list[Answer]) -> tuple[int, float]:
    """Return how many answers are equal, and the mean distance of the likeliest first tokens in nats."""
    distances = []
    for mine, other in zip(ours, theirs, strict=True):
        likeliest = sorted(other.first, key=lambda token: -other.first[token])[:TOP]
        shared = [token for token in likeliest if token in mine.first]
        distances.append(sum(abs(mine.first[token] - other.first[token]) for token in shared) / len(shared))
    equal = sum(mine.tokens == other.tokens for mine, other in zip(ours, theirs, strict=True))
    return equal, sum(distances) / len(distances)


def rounded(tensor: Any) -> Stored:
    """Store a matrix as Q8_0, as llama.cpp's own tool rounds it."""
    if tensor.dim() < 2 or tensor.shape[1] % PER_SCALE:
        return plain(tensor)
    return Stored(Kind.Q8_0, quantize(tensor.float().contiguous().numpy(), Kind.Q8_0))


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", help="such as quantize/gptq-w4g64")
    parser.add_argument("--tokens", type=int, default=12)
    options = parser.parse_args()
    if find_spec("xllamacpp") is None:
        show("xllamacpp is not installed, so llama.cpp cannot run: python -m pip install xllamacpp")
        return
    base = load_record(options.artifact)["lineage"][0]
    with tempfile.TemporaryDirectory() as place:
        file, floats, coarse = (Path(place, name) for name in ("artifact.gguf", "base.gguf", "base-q8.gguf"))
        written = write_gguf(options.artifact, MODELS / options.artifact, file)
        whole = write_gguf(base, MODELS / base, floats)
        write_gguf(base, MODELS / base, coarse, rounded)
        tell("export.megabytes", written.size / 1e6)
        tell("export.share_of_base", written.size / whole.size)
        exported = by_llama(file, options.tokens)
        spread = compare(by_llama(coarse, options.tokens), by_llama(floats, options.tokens))
    equal, distance = compare(exported, by_transformers(options.artifact, options.tokens))
    tell("export.prompts", len(PROMPTS))
    tell("export.answers_equal", equal)
    tell("export.answers_equal_f16_q8_0", spread[0])
    tell("export.log_probability_difference", distance)
    tell("export.log_probability_difference_f16_q8_0", spread[1])


if __name__ == "__main__":
    main()

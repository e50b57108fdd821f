"""Likelihoods after few-shot examples against plain lm-eval, in the shape of MMLU with five shots.

    python -m benchmarks.fewshot data/models/base/smollm2 --device cuda --dtype float32

The requests are made up of random tokens, as MMLU's data needs the hub: for each subject 600 tokens of
examples, then questions of 40 to 130 tokens with four choices of a token each. Both sides get the same tokens
and the same batch size, and take turns in one run, `--runs` times after a warm-up; figures are medians,
loading excluded. In float32 no choice may differ, which `fewshot.choices_identical` tells.

Each line is a JSON object. The aim on a GPU: `fewshot.times_faster_than_lm_eval` at least 3.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import TypeAlias

from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.figures import tell
from stages.core.lazy import torch
from stages.core.run import Run
from stages.corpus.windows import text_token_ids
from stages.evaluation.room import memory_of, usual_rows
from stages.evaluation.shared import SharedPrefixLM
from stages.model.blocks import embedding_rows

EXAMPLES, QUESTION, CHOICES = 600, (40, 130), 4
Request: TypeAlias = tuple[tuple[str, str], list[int], list[int]]


def subject(ids: list[int], items: int, draw: random.Random) -> list[Request]:
    """Draw a subject's requests from the token ids of text: the choices of an item follow each other."""
    examples = draw.choices(ids, k=EXAMPLES)
    requests: list[Request] = []
    for _ in range(items):
        context = examples + draw.choices(ids, k=draw.randint(*QUESTION))
        requests += [(("", ""), context, [choice]) for choice in draw.sample(ids, CHOICES)]
    return requests


def timed(lm: HFLM, subjects: list[list[Request]]) -> tuple[float, list[float]]:
    """Return the seconds that all likelihoods take, and their values in nats."""
    start = time.perf_counter()
    answers = [lm._loglikelihood_tokens(requests, disable_tqdm=True) for requests in subjects]
    return time.perf_counter() - start, [total for part in answers for total, _ in part]


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=100, help="items of a subject")
    parser.add_argument("--subjects", type=int, default=1)
    parser.add_argument("--batch-size", type=int, help="rows of a forward; what suites get that name none")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    run = Run(device=options.device, dtype=options.dtype, threads=options.threads, seed=0, numerics="fast")
    device = run.start()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=run.torch_dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    size = options.batch_size or usual_rows(device)
    shared = {
        "pretrained": model, "tokenizer": tokenizer, "batch_size": size, "device": str(device),
        "softmax_dtype": "float32",
    }  # fmt: skip
    sides = {"ours": SharedPrefixLM(memory=memory_of(device), **shared), "theirs": HFLM(**shared)}
    draw = random.Random(0)
    ids = text_token_ids(tokenizer, embedding_rows(model)).tolist()
    subjects = [subject(ids, options.items, draw) for _ in range(options.subjects)]
    for lm in sides.values():
        timed(lm, [subjects[0][: CHOICES * size]])
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    values: dict[str, list[float]] = {}
    for _ in range(options.runs):
        for side, lm in sides.items():
            took, values[side] = timed(lm, subjects)
            seconds[side].append(took)
    ours, theirs = (torch.tensor(values[side]).view(-1, CHOICES) for side in ("ours", "theirs"))
    rates = {side: len(ours) / statistics.median(each) for side, each in seconds.items()}
    tell("fewshot.batch_size", size)
    tell("fewshot.items_per_second", rates["ours"])
    tell("fewshot.items_per_second_lm_eval", rates["theirs"])
    tell("fewshot.times_faster_than_lm_eval", rates["ours"] / rates["theirs"])
    tell("fewshot.choices_identical", bool((ours.argmax(1) == theirs.argmax(1)).all()))
    tell("fewshot.log_likelihood_difference", float((ours - theirs).abs().max()))


if __name__ == "__main__":
    main()

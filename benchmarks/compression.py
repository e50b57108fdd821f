"""Compression against llm-compressor: time over one forward pass, speed and perplexity, all in one run.

    make bench                          # creates environment and data, runs this and benchmarks.memory
    python -m benchmarks.compression    # if environment and data exist

Both sides compress the same model in memory with the same settings, from the same calibration tokens, on the
same number of threads; loading and saving are not timed. llm-compressor pins other versions, so it runs in an
environment of its own; it shuffles its samples, so it runs several times. Each compressed model is scored by
the same windowed perplexity on the held-out half of its text.

A plain forward takes the tokens in batches, as the walk does, which is faster than all at once (both are
printed).

Each side chooses which linears are compressed when the inputs of a linear are measured (`sequential` here,
`pipeline` there, see `ROWS`). llm-compressor's default is those of the blocks before. Rows `wanda`,
`sparsegpt` and `gptq` compare with that default; here SparseGPT and GPTQ have every linear before compressed,
Wanda none. Three more rows compare Wanda: `wanda_dense_inputs`, none on both sides; `wanda_block_inputs`, the
blocks before on both; `wanda_linear_inputs`, every linear before here, the blocks before there.

Each line is a JSON object. The aims: `forwards` at most 1.3 for `wanda` and 2.5 for `sparsegpt` and `gptq`;
`times_faster_than_llmcompressor` at least 4 for `wanda` and 3 for the others;
`perplexity_over_llmcompressor`, a ratio of medians on the worst of the texts, at most 1. `ratio` is over the
windows of a text, or of all texts; `ratio_stderr` is its standard error over these held-out windows, which
both models have read.
"""

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.figures import tell
from stages.compress.method import WeightMethod
from stages.compress.walk import walk
from stages.core.numbers import count_of
from stages.core.run import Run
from stages.corpus.windows import Calibration, Sequential, calibration_windows, cut_windows, read_documents
from stages.model.blocks import forward
from stages.model.grid import Quantized
from stages.pruning.pruner import Pruner
from stages.pruning.sparsegpt import SparseGPT
from stages.pruning.wanda import Wanda
from stages.quantization.gptq import GPTQ

MODEL = Path("data/models/base/smollm2")
BATCH = 2048
"""Tokens of a plain forward at a time; 1024 to 8192 take equally long here, fewer or all at once longer."""
EVALUATED = 64
"""Windows of 512 tokens over which a perplexity is taken."""
ROWS: dict[str, tuple[str, Sequential, str]] = {
    "wanda": ("wanda", "none", "sequential"),
    "wanda_dense_inputs": ("wanda", "none", "basic"),
    "wanda_block_inputs": ("wanda", "block", "sequential"),
    "wanda_linear_inputs": ("wanda", "linear", "sequential"),
    "sparsegpt": ("sparsegpt", "linear", "sequential"),
    "gptq": ("gptq", "linear", "sequential"),
}
"""The comparisons: method, our `sequential`, pipeline of llm-compressor."""


class Side(NamedTuple):
    """The seconds of every run of a side, and the `losses` of its model."""

    seconds: list[float]
    losses: list[float]


def recipe_of(method: str, calibration: Calibration, sequential: Sequential) -> WeightMethod:
    """Return a recipe with the settings that `benchmarks.llmcompressor_side` has too."""
    text = calibration.model_copy(update={"sequential": sequential})
    shared: dict[str, Any] = {"source": "base/smollm2", "method": method, "calibration": text}
    if method == "gptq":
        return GPTQ(bits=4, group_size=64, **shared)
    return {"wanda": Wanda, "sparsegpt": SparseGPT}[method](sparsity=0.5, **shared)


def load(path: Path) -> Any:
    """Load a checkpoint as plain weights in bf16."""
    options: dict[str, Any] = {}
    config = json.loads((path / "config.json").read_text())
    if config.get("quantization_config"):
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()


def compress(recipe: WeightMethod, model: Any, tokens: Tensor) -> None:
    """Replace the weight of every block linear of a model in memory, as `WeightMethod.execute` does."""

    def replace(linears: Any, statistic: Any) -> Iterator[Tensor]:
        share = recipe.sparsity if isinstance(recipe, Pruner) else 0
        plan = {linear.name: count_of(share, linear.weight.numel()) for linear in linears}
        for weight in recipe.replace_group(linears, statistic, plan):
            yield weight.dequantize() if isinstance(weight, Quantized) else weight

    assert isinstance(recipe.calibration, Calibration)
    walk(
        model, replace, by_group=True, windows=tokens, statistic=recipe.statistic, label=recipe.method,
        sequential=recipe.calibration.sequential,
    )  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def losses(model: Any, held_out: Tensor) -> list[float]:
    """Return the mean negative log-likelihood of each of `[windows, tokens]`, first token excluded."""
    by_window = []
    with torch.no_grad():
        for window in held_out:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            by_window.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    return by_window


def perplexity(by_window: list[float]) -> float:
    """Return exp of the mean loss over windows, which are equally long."""
    return math.exp(statistics.fmean(by_window))


def run_ours(recipe: WeightMethod, tokens: Tensor, held_out: Tensor, runs: int) -> Side:
    """Compress the model `runs` times; the result is the same each time."""
    times = []
    for _ in range(runs):
        model = load(MODEL)
        times.append(seconds(lambda: compress(recipe, model, tokens)))  # noqa: B023
    return Side(times, losses(model, held_out))


def run_llmcompressor(
    python: str, method: str, pipeline: str, tokens: Tensor, threads: int, seed: int, folder: Path
) -> float:
    """Compress with llm-compressor into `folder` and return the seconds it reports.

    Raises:
        SystemExit: it failed; the message ends with its output.
    """
    ids = folder.with_suffix(".safetensors")
    save_file({"input_ids": tokens.contiguous()}, ids)
    script = Path(__file__).with_name("llmcompressor_side.py")
    arguments = (MODEL, ids, method, pipeline, folder, threads, seed)
    command = [python, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def run_theirs(
    options: argparse.Namespace, method: str, pipeline: str, tokens: Tensor, held_out: Tensor
) -> Side:
    """Compress with llm-compressor `options.runs` times, and keep the losses of median perplexity."""
    times: list[float] = []
    runs: list[list[float]] = []
    for seed in range(options.runs):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            times.append(
                run_llmcompressor(options.python, method, pipeline, tokens, options.threads, seed, folder)
            )
            runs.append(losses(load(folder), held_out))
    return Side(times, sorted(runs, key=perplexity)[len(runs) // 2])


def compared(
    options: argparse.Namespace, calibration: Calibration, tokens: Tensor, held_out: Tensor
) -> Iterator[tuple[str, Side, Side]]:
    """Yield each row's name, our side and theirs; a side that rows share runs once."""
    ours = cache(
        lambda method, sequential: run_ours(
            recipe_of(method, calibration, sequential), tokens, held_out, options.runs
        )
    )
    theirs = cache(lambda method, pipeline: run_theirs(options, method, pipeline, tokens, held_out))
    for name in options.rows:
        method, sequential, pipeline = ROWS[name]
        yield name, ours(method, sequential), theirs(method, pipeline)


def tell_ratio(figures: str, differences: list[float]) -> float:
    """Print and return our perplexity over theirs, from the difference of losses on every window."""
    ratio = perplexity(differences)
    tell(f"{figures}.ratio", ratio)
    tell(f"{figures}.ratio_stderr", ratio * statistics.stdev(differences) / math.sqrt(len(differences)))
    return ratio


def read_options() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SystemExit: an option is wrong, or the model or llm-compressor's environment is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--texts", nargs="+", default=["news", "speeches"])
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; an odd number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument(
        "--python", default=".venv-llmcompressor/bin/python", help="interpreter with llm-compressor"
    )
    options = parser.parse_args()
    options.rows = list(dict.fromkeys(options.rows))
    if options.runs % 2 == 0:
        parser.error(f"--runs {options.runs} has no median run; choose an odd number.")
    if not Path(options.python).exists():
        raise SystemExit(f"{options.python} is missing; run make bench, or name another with --python.")
    if not (MODEL / "model.safetensors").exists():
        raise SystemExit(f"{MODEL} is missing; run dvc repro model@smollm2 dataset@news dataset@speeches.")
    return options


def main() -> None:
    """Parse the command line and print the figures."""
    options = read_options()
    Run(device="cpu", dtype="bfloat16", threads=options.threads, seed=0, numerics="fast").start()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ratios: dict[str, list[float]] = defaultdict(list)
    our_seconds: dict[str, list[float]] = defaultdict(list)
    their_seconds: dict[str, list[float]] = defaultdict(list)
    differences: dict[str, list[float]] = defaultdict(list)
    """Of the losses on every window of all texts, by row."""
    batched: list[float] = []
    at_once: list[float] = []
    for text in options.texts:
        calibration = Calibration(
            dataset=text, num_samples=options.samples, sequence_length=options.sequence_length
        )
        dense = load(MODEL)
        tokens = calibration_windows(tokenizer, calibration, dense.config.vocab_size)
        held_out = cut_windows(tokenizer, read_documents(text, "evaluation"), 512)[:EVALUATED]
        batches = tokens.split(max(1, BATCH // options.sequence_length))
        for _ in range(options.runs):
            batched.append(sum(seconds(lambda: forward(dense, batch)) for batch in batches))  # noqa: B023
        at_once.append(seconds(lambda: forward(dense, tokens)))  # noqa: B023
        tell(f"dense.{text}.perplexity", perplexity(losses(dense, held_out)))
        for name, ours, theirs in compared(options, calibration, tokens, held_out):
            our_seconds[name] += ours.seconds
            their_seconds[name] += theirs.seconds
            tell(f"{name}.{text}.perplexity", perplexity(ours.losses))
            tell(f"{name}.{text}.perplexity_llmcompressor", perplexity(theirs.losses))
            by_window = [our - their for our, their in zip(ours.losses, theirs.losses, strict=True)]
            ratios[name].append(tell_ratio(f"{name}.{text}", by_window))
            differences[name] += by_window
    tell("forward.seconds", statistics.median(batched))
    tell("forward.seconds_all_at_once", statistics.median(at_once))
    for name in options.rows:
        our_median, their_median = (statistics.median(times[name]) for times in (our_seconds, their_seconds))
        tell(f"{name}.seconds", our_median)
        tell(f"{name}.forwards", our_median / statistics.median(batched))
        tell(f"{name}.seconds_llmcompressor", their_median)
        tell(f"{name}.times_faster_than_llmcompressor", their_median / our_median)
        tell(f"{name}.perplexity_over_llmcompressor", max(ratios[name]))
        tell_ratio(name, differences[name])


if __name__ == "__main__":
    main()

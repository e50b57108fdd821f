"""Compression against llm-compressor: time over one forward pass, speed, perplexity, all in one run.

    make bench                                # the environment, the data, this and benchmarks.memory
    python -m benchmarks.compression          # once the first two are there

Both sides compress the same model in memory with the same settings from the same calibration tokens on
the same number of threads; loading and saving are outside the clock on both. llm-compressor runs in an
environment of its own, as its pins clash with ours, and is run several times, as it shuffles its samples.
Each compressed model is scored by the same windowed perplexity on the held-out half of its text.

A plain forward takes the tokens in batches, which is faster than all at once (both are printed) and what the
walk does too; its attention is torch's, which `attention.times_faster` compares with that of the walk on the
same shapes.

What a linear's inputs have come through is a choice on each side (`sequential` here, `pipeline` there, see
`ROWS`). llm-compressor's default is the blocks before, compressed. The rows `wanda`, `sparsegpt` and `gptq`
compare with that default; here SparseGPT and GPTQ see every linear before compressed, Wanda dense inputs.
Three more rows compare Wanda otherwise: `wanda_dense_inputs`, dense on both sides; `wanda_block_inputs`, by
the blocks before on both; `wanda_linear_inputs`, here by every linear before, there by the blocks.

One JSON object a line. The aims: `wanda.forwards` 1.3 at most, of `sparsegpt` and `gptq` 2.5;
`times_faster_than_llmcompressor` 4 for `wanda` and 3 at least; `perplexity_over_llmcompressor`, a ratio of
medians, the worst of the texts, 1 at most. `ratio` is that of one text, or over the windows of all, and
`ratio_stderr` its standard error over the held-out windows, which both models have read.
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
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.figures import tell
from stages.compress.causal import causal_attention
from stages.compress.method import WeightMethod
from stages.compress.walk import Sequential, walk
from stages.core.run import Run
from stages.corpus.windows import Calibration, calibration_windows, cut_windows, read_documents
from stages.model.blocks import forward
from stages.model.grid import Quantized
from stages.pruning.pruner import Pruner
from stages.pruning.sparsegpt import SparseGPT
from stages.pruning.wanda import Wanda
from stages.quantization.gptq import GPTQ

MODEL = Path("data/models/base/smollm2")
BATCH = 2048
"""Tokens of a plain forward at a time; 1024 to 8192 take the same here, fewer or all take longer."""
EVALUATED = 64
"""Windows of 512 tokens a perplexity is taken over."""
ROWS: dict[str, tuple[str, Sequential, str]] = {
    "wanda": ("wanda", "none", "sequential"),
    "wanda_dense_inputs": ("wanda", "none", "basic"),
    "wanda_block_inputs": ("wanda", "block", "sequential"),
    "wanda_linear_inputs": ("wanda", "linear", "sequential"),
    "sparsegpt": ("sparsegpt", "linear", "sequential"),
    "gptq": ("gptq", "linear", "sequential"),
}
"""What is compared: the method, our `sequential`, the pipeline of llm-compressor."""


def recipe_of(method: str, calibration: Calibration, sequential: Sequential) -> WeightMethod:
    """A recipe, with the settings `benchmarks.other_side` repeats on the other side."""
    seen = calibration.model_copy(update={"sequential": sequential})
    shared: dict[str, Any] = {"source": "base/smollm2", "method": method, "calibration": seen}
    if method == "gptq":
        return GPTQ(bits=4, group_size=64, **shared)
    return {"wanda": Wanda, "sparsegpt": SparseGPT}[method](sparsity=0.5, **shared)


def load(path: Path) -> Any:
    """A checkpoint as plain weights in bf16."""
    options: dict[str, Any] = {}
    config = json.loads((path / "config.json").read_text())
    if config.get("quantization_config"):
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()


def compress(recipe: WeightMethod, model: Any, tokens: Tensor) -> None:
    """Replace the weights of every block linear of a model in memory, as `WeightMethod.execute` does."""

    def replace(linear: Any, statistic: Any) -> Tensor:
        zeros = recipe.zeros(*linear.weight.shape) if isinstance(recipe, Pruner) else None
        made = recipe.replace(linear, statistic, {linear.name: zeros})
        return made.dequantize() if isinstance(made, Quantized) else made

    assert isinstance(recipe.calibration, Calibration)
    walk(
        model, replace, windows=tokens, statistic=recipe.statistic, label=recipe.method,
        sequential=recipe.calibration.sequential,
    )  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def attention_times_faster(model: Any, tokens: int) -> float:
    """torch's time for one block's attention over `BATCH` tokens, in windows of `tokens`, over ours."""
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    size = model.config.hidden_size // heads
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(max(1, BATCH // tokens), number, tokens, size, generator=draw).bfloat16()
        for number in (heads, groups, groups)
    )

    def median(work: Callable[[], object]) -> float:
        return statistics.median(seconds(work) for _ in range(20))

    torchs = median(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return torchs / median(lambda: causal_attention(q, k, v))


def losses(model: Any, held_out: Tensor) -> list[float]:
    """The mean negative log-likelihood of the tokens but the first of each of `[windows, tokens]`."""
    found = []
    with torch.no_grad():
        for window in held_out:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            found.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    return found


def perplexity(found: list[float]) -> float:
    """exp of the mean over windows, which are equally long."""
    return math.exp(statistics.fmean(found))


def timed(
    recipe: WeightMethod, tokens: Tensor, held_out: Tensor, runs: int
) -> tuple[list[float], list[float]]:
    """Our seconds of every run, and the `losses` of what it makes, which is the same every time."""
    took = []
    for _ in range(runs):
        model = load(MODEL)
        took.append(seconds(lambda: compress(recipe, model, tokens)))  # noqa: B023
    return took, losses(model, held_out)


def theirs(
    python: str, method: str, pipeline: str, tokens: Tensor, threads: int, seed: int, folder: Path
) -> float:
    """Compress with llm-compressor into `folder`; returns the seconds it says it took.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    ids = folder.with_suffix(".safetensors")
    save_file({"input_ids": tokens.contiguous()}, ids)
    script = Path(__file__).with_name("other_side.py")
    told = (MODEL, ids, method, pipeline, folder, threads, seed)
    command = [python, str(script), *map(str, told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def middle(
    options: argparse.Namespace, method: str, pipeline: str, tokens: Tensor, held_out: Tensor
) -> tuple[list[float], list[float]]:
    """llm-compressor's seconds of every run, and the `losses` of the run of median perplexity."""
    took: list[float] = []
    found: list[list[float]] = []
    for run in range(options.runs):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            took.append(theirs(options.python, method, pipeline, tokens, options.threads, run, folder))
            found.append(losses(load(folder), held_out))
    return took, sorted(found, key=perplexity)[len(found) // 2]


def sides(
    options: argparse.Namespace, wanted: Calibration, tokens: Tensor, held_out: Tensor
) -> Iterator[tuple[str, tuple[list[float], list[float]], tuple[list[float], list[float]]]]:
    """Of every row its name, what `timed` and what `middle` say; what rows share is run once."""
    ours = cache(
        lambda method, sequential: timed(
            recipe_of(method, wanted, sequential), tokens, held_out, options.runs
        )
    )
    others = cache(lambda method, pipeline: middle(options, method, pipeline, tokens, held_out))
    for name in options.rows:
        method, sequential, pipeline = ROWS[name]
        yield name, ours(method, sequential), others(method, pipeline)


def tell_ratio(figures: str, apart: list[float]) -> float:
    """Print and return our perplexity over theirs, from the difference of losses of every window."""
    ratio = perplexity(apart)
    tell(f"{figures}.ratio", ratio)
    tell(f"{figures}.ratio_stderr", ratio * statistics.stdev(apart) / math.sqrt(len(apart)))
    return ratio


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--texts", nargs="+", default=["news", "speeches"])
    parser.add_argument("--runs", type=int, default=3, help="of llm-compressor, and of our clock; odd")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--python", default=".venv-llmcompressor/bin/python", help="with llm-compressor")
    options = parser.parse_args()
    options.rows = list(dict.fromkeys(options.rows))
    if options.runs % 2 == 0:
        parser.error(f"--runs {options.runs} has no middle one; take an odd number.")
    if not Path(options.python).exists():
        raise SystemExit(f"there is no {options.python}; make bench makes it, or name another by --python.")
    if not (MODEL / "model.safetensors").exists():
        raise SystemExit(f"there is no {MODEL}; run dvc repro model@smollm2 dataset@news dataset@speeches.")
    Run(device="cpu", dtype="bfloat16", threads=options.threads, seed=0).start()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ratios: dict[str, list[float]] = defaultdict(list)
    ours_s: dict[str, list[float]] = defaultdict(list)
    theirs_s: dict[str, list[float]] = defaultdict(list)
    windows_apart: dict[str, list[float]] = defaultdict(list)
    plain: list[float] = []
    whole: list[float] = []
    for text in options.texts:
        wanted = Calibration(
            dataset=text, num_samples=options.samples, sequence_length=options.sequence_length
        )
        dense = load(MODEL)
        tokens = calibration_windows(tokenizer, wanted, dense.config.vocab_size)
        held_out = cut_windows(tokenizer, read_documents(text, "evaluation"), 512)[:EVALUATED]
        batches = tokens.split(max(1, BATCH // options.sequence_length))
        for _ in range(options.runs):
            plain.append(sum(seconds(lambda: forward(dense, batch)) for batch in batches))  # noqa: B023
        whole.append(seconds(lambda: forward(dense, tokens)))  # noqa: B023
        tell(f"dense.{text}.perplexity", perplexity(losses(dense, held_out)))
        for name, (took, mine), (other_took, other) in sides(options, wanted, tokens, held_out):
            ours_s[name] += took
            theirs_s[name] += other_took
            tell(f"{name}.{text}.perplexity", perplexity(mine))
            tell(f"{name}.{text}.perplexity_llmcompressor", perplexity(other))
            apart = [one - its for one, its in zip(mine, other, strict=True)]
            ratios[name].append(tell_ratio(f"{name}.{text}", apart))
            windows_apart[name] += apart
    tell("forward.seconds", statistics.median(plain))
    tell("forward.seconds_all_at_once", statistics.median(whole))
    tell("attention.times_faster", attention_times_faster(dense, options.sequence_length))
    for name in options.rows:
        seconds_ours, seconds_theirs = statistics.median(ours_s[name]), statistics.median(theirs_s[name])
        tell(f"{name}.seconds", seconds_ours)
        tell(f"{name}.forwards", seconds_ours / statistics.median(plain))
        tell(f"{name}.seconds_llmcompressor", seconds_theirs)
        tell(f"{name}.times_faster_than_llmcompressor", seconds_theirs / seconds_ours)
        tell(f"{name}.perplexity_over_llmcompressor", max(ratios[name]))
        tell_ratio(name, windows_apart[name])


if __name__ == "__main__":
    main()

"""Peak memory of pruning a model larger than it: random weights in the shape of Llama-3.1-8B.

    python -m benchmarks.memory                    # 32 blocks, 16 GB on disk, deleted after
    python -m benchmarks.memory --blocks 4 8       # a quicker look

For every number of blocks the model is made in a scratch project, then pruned by magnitude and by Wanda
through `python -m stages.prune`, as a user would; the largest one is killed half way by magnitude and
started again. `peak_gib` is the process' VmHWM, everything in it counted; `growth_per_block` is how much
the peak grew a block from the fewest to the most, in GiB: nothing, if blocks really stream.
One JSON object a line.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.figures import tell

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256,
}  # fmt: skip
HIDDEN, WIDE, KEY = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_key_value_heads"] * 128
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEY, HIDDEN),
    "self_attn.v_proj": (KEY, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE),
}  # fmt: skip
"""Of a block, `(out, in)`."""


def size_of(count: int) -> int:
    """Bytes of a checkpoint with `count` blocks, norms left out."""
    return 2 * (count * sum(map(math.prod, LINEARS.values())) + 2 * SHAPE["vocab_size"] * HIDDEN)


def make(folder: Path, count: int, tokenizer: Path) -> None:
    """A checkpoint with `count` blocks of random bf16 weights, a shard a block, as a base artifact."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)

    index: dict[str, str] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{count + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for block in range(count):
        at = f"model.layers.{block}"
        tensors = {f"{at}.{name}.weight": weight(*shape) for name, shape in LINEARS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        write(block + 1, tensors)
    vocabulary = SHAPE["vocab_size"]
    rest = {
        "model.embed_tokens.weight": weight(vocabulary, HIDDEN),
        "lm_head.weight": weight(vocabulary, HIDDEN),
    }
    write(count + 1, rest | {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=count, tie_word_embeddings=False, dtype="bfloat16",
        max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    record = {"artifact": "base/big", "lineage": ["base/big"], "recipes": {}, "base": {"name": "big"}}
    (folder / "artifact.json").write_text(json.dumps(record))


def project(folder: Path, news: Path, samples: int, length: int) -> None:
    """A project with the two recipes and the text, in `folder`."""
    yaml = YAML(typ="safe", pure=True)
    params: dict[str, Any] = yaml.load((ROOT / "params.yaml").read_text())
    text = {"dataset": "news", "num_samples": samples, "sequence_length": length}
    params["models"] = {"big": {**params["models"]["smollm2"], "in_features": [4096, 14336]}}
    params["datasets"] = {"news": params["datasets"]["news"]}
    params["run"] |= {"device": "cpu", "threads": os.cpu_count()}
    params["prune"] = {
        "magnitude": {
            "source": "base/big", "method": "magnitude", "sparsity": 0.5, "scope": "matrix",
            "calibration": {"dataset": "none"},
        },
        "wanda": {"source": "base/big", "method": "wanda", "sparsity": 0.5, "calibration": text},
    }  # fmt: skip
    params |= {"quantize": {}, "teach": {}, "finetune": {}, "noise": {}, "floor": {}}
    params["profile"]["candidates"] = []
    params["suites"] = {"perplexity": {}, "graded": {}, "benchmark": {}}
    params["evaluate"] = {"candidates": ["base/big"]}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params, file)
    shutil.copytree(news, folder / "data/datasets/news")
    (folder / "data/datasets/none").mkdir()


def prune(folder: Path, recipe: str, kill_after: int | None = None) -> tuple[float, float]:
    """Run the stage; returns its VmHWM in GiB and its seconds. `kill_after` that many shards, SIGKILL."""
    start, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(
            [sys.executable, "-m", "stages.prune", recipe],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=told,
        )  # fmt: skip
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
                peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) / 2**20)
            except (FileNotFoundError, IndexError, ProcessLookupError):
                pass  # it has just ended
            if kill_after and len(list(folder.glob("data/scratch/resume/*/*/*.json"))) >= kill_after:
                child.send_signal(signal.SIGKILL)
                child.wait()
                return peak, time.monotonic() - start
            time.sleep(0.2)
        if child.returncode:
            told.seek(0)
            last = told.read()[-4000:]
            raise SystemExit(f"python -m stages.prune {recipe} ended with {child.returncode}:\n{last}")
    return peak, time.monotonic() - start


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="with models/base/smollm2 and datasets/news"
    )
    options = parser.parse_args()
    tokenizer, news = options.data / "models/base/smollm2", options.data / "datasets/news"
    if missing := [str(path) for path in (tokenizer, news) if not path.exists()]:
        raise SystemExit(f"there is no {', '.join(missing)}; run dvc repro model@smollm2 dataset@news.")
    scratch = options.data / "scratch"
    scratch.mkdir(exist_ok=True)
    # The source, and the pruned one beside it.
    needed, free = 2.1 * size_of(max(options.blocks)) / 2**30, shutil.disk_usage(scratch).free / 2**30
    if free < needed:
        raise SystemExit(
            f"{max(options.blocks)} blocks take {needed:.1f} GiB in {scratch} and {free:.1f} are free; "
            "give --blocks fewer or make room."
        )
    peaks: dict[str, dict[int, float]] = {"magnitude": {}, "wanda": {}}
    for count in sorted(options.blocks):
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            folder = Path(name)
            project(folder, news, options.samples, options.sequence_length)
            make(folder / "data/models/base/big", count, tokenizer)
            size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
            tell(f"checkpoint.{count}_blocks.gib", size / 2**30)
            if count == max(options.blocks):
                _, took = prune(folder, "magnitude", kill_after=count // 2)
                tell("magnitude.killed_after_seconds", took)
                kept = len(list(folder.glob("data/scratch/resume/*/*/*.json")))
                tell("magnitude.blocks_kept_by_the_kill", kept)
                _, took = prune(folder, "magnitude")
                tell("magnitude.resumed_seconds", took)
                shutil.rmtree(folder / "data/models/prune")
            for recipe, found in peaks.items():
                found[count], took = prune(folder, recipe)
                tell(f"{recipe}.{count}_blocks.peak_gib", found[count])
                tell(f"{recipe}.{count}_blocks.seconds", took)
                shutil.rmtree(folder / "data/models/prune")
    few, many = min(options.blocks), max(options.blocks)
    tell("peak_gib", max(found[many] for found in peaks.values()))
    if few < many:
        growth = max((found[many] - found[few]) / (many - few) for found in peaks.values())
        tell("growth_per_block", growth)


if __name__ == "__main__":
    main()

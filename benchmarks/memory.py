"""Peak memory of pruning a model larger than it: random weights in the shape of Llama-3.1-8B.

    python -m benchmarks.memory                    # 8 and 32 blocks; needs 34 GB of disk, deleted afterwards
    python -m benchmarks.memory --blocks 4 8       # a quicker look

For every number of blocks, write the model into a scratch project and prune it by magnitude and by Wanda with
`python -m stages.prune`, as a user would; kill the magnitude run on the largest model half way and start it
again. `peak_gib` is VmHWM of the whole process. `growth_per_block` is the growth of the peak per block, from
the smallest to the largest model, in GiB; it is about zero if blocks really stream.

Each line is a JSON object.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.checkpoint import write_random
from benchmarks.figures import tell
from benchmarks.limits import BlockWork

ROOT = Path(__file__).parents[1]
SAVED_BLOCKS = "data/scratch/resume/*/*/*.json"
"""Files of a killed run, as many as it finished blocks."""


def shape(count: int) -> LlamaConfig:
    """Return the config of a model in the shape of Llama-3.1-8B with `count` blocks."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, num_hidden_layers=count, tie_word_embeddings=False, dtype="bfloat16",
        max_position_embeddings=8192,
    )  # fmt: skip


def size_of(count: int) -> int:
    """Return the bytes of a checkpoint with `count` blocks, without its norms."""
    config = shape(count)
    return count * BlockWork.of(config, 0, 0).bytes + 4 * config.vocab_size * config.hidden_size


def project(folder: Path, news: Path, samples: int, length: int) -> None:
    """Set up a project with the two recipes and their text in `folder`."""
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
    params["suites"] = {}
    params["evaluate"] = {"candidates": ["base/big"]}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params, file)
    shutil.copytree(news, folder / "data/datasets/news")
    (folder / "data/datasets/none").mkdir()
    subprocess.run([sys.executable, "-m", "stages.code"], cwd=folder, env=environment(), check=True)


def environment() -> dict[str, str]:
    """Return the environment of a stage in a scratch project."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def prune(folder: Path, recipe: str, kill_after: int | None = None) -> tuple[float, float]:
    """Run the stage and return its VmHWM in GiB and its seconds.

    Args:
        kill_after: send SIGKILL once so many blocks are finished; None lets it end.

    Raises:
        SystemExit: it failed; the message ends with its output.
    """
    start, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "stages.prune", recipe],
            cwd=folder, env=environment(), stderr=errors,
        )  # fmt: skip
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
                peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) / 2**20)
            except (FileNotFoundError, IndexError, ProcessLookupError):
                pass  # it has just ended
            if kill_after and len(list(folder.glob(SAVED_BLOCKS))) >= kill_after:
                child.send_signal(signal.SIGKILL)
                child.wait()
                return peak, time.monotonic() - start
            time.sleep(0.2)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(
                f"python -m stages.prune {recipe} ended with {child.returncode}:\n{errors.read()[-4000:]}"
            )
    return peak, time.monotonic() - start


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32], help="sizes to measure")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with models/base/smollm2 and datasets/news"
    )
    options = parser.parse_args()
    tokenizer, news = options.data / "models/base/smollm2", options.data / "datasets/news"
    if missing := [str(path) for path in (tokenizer, news) if not path.exists()]:
        raise SystemExit(f"{', '.join(missing)} missing; run dvc repro model@smollm2 dataset@news.")
    scratch = options.data / "scratch"
    scratch.mkdir(exist_ok=True)
    few, many = min(options.blocks), max(options.blocks)
    needed = 2.1 * size_of(many) / 2**30  # the source, and the pruned model beside it
    if (free := shutil.disk_usage(scratch).free / 2**30) < needed:
        raise SystemExit(
            f"{many} blocks need {needed:.1f} GiB in {scratch}, but {free:.1f} are free; lower --blocks or "
            "free space."
        )
    peaks: dict[str, dict[int, float]] = {"magnitude": {}, "wanda": {}}
    for count in sorted(options.blocks):
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            folder = Path(name)
            project(folder, news, options.samples, options.sequence_length)
            words = AutoTokenizer.from_pretrained(tokenizer)
            write_random(folder / "data/models/base/big", shape(count), words)
            size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
            tell(f"checkpoint.{count}_blocks.gib", size / 2**30)
            if count == many:
                _, seconds = prune(folder, "magnitude", kill_after=count // 2)
                tell("magnitude.killed_after_seconds", seconds)
                tell("magnitude.blocks_kept_by_the_kill", len(list(folder.glob(SAVED_BLOCKS))))
                _, seconds = prune(folder, "magnitude")
                tell("magnitude.resumed_seconds", seconds)
                shutil.rmtree(folder / "data/models/prune")
            for recipe, by_count in peaks.items():
                by_count[count], seconds = prune(folder, recipe)
                tell(f"{recipe}.{count}_blocks.peak_gib", by_count[count])
                tell(f"{recipe}.{count}_blocks.seconds", seconds)
                shutil.rmtree(folder / "data/models/prune")
    tell("peak_gib", max(by_count[many] for by_count in peaks.values()))
    if few < many:
        growth = max((by_count[many] - by_count[few]) / (many - few) for by_count in peaks.values())
        tell("growth_per_block", growth)


if __name__ == "__main__":
    main()

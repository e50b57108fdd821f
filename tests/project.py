"""A whole project in a temporary folder: the real code and graph, a tiny model, a little text."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from stages.core.files import sha256
from tests import families

ROOT = Path(__file__).parents[1]
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_OFFLINE": "1",
}


def importing(folder: Path) -> dict[str, str]:
    """The variable that lets a child import from `folder`, beside what it is set to here."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def text(seed: int, documents: int = 60) -> str:
    """Lines of made-up words, different at each seed."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(400)]
    return "\n".join(" ".join(draw.choices(words, k=40)) for _ in range(documents)) + "\n"


def params(folder: Path) -> dict[str, Any]:
    """Params of a small sweep over the inputs in `folder`: every stage, two methods each."""
    news = {"dataset": "news", "num_samples": 4, "sequence_length": 32}
    none = {"dataset": "none"}
    base = "base/tiny"

    def dataset(name: str) -> dict[str, Any]:
        return {
            "kind": "text", "source": f"path:{folder}", "file": f"{name}.txt",
            "sha256": sha256(folder / f"{name}.txt"), "documents": "lines", "calibration": 0.5,
        }  # fmt: skip

    return {
        "run": {"device": families.DEVICE, "dtype": "bfloat16", "threads": 1, "seed": 0, "numerics": "fast"},
        "models": {
            "tiny": {
                "source": f"path:{folder / 'tiny'}", "format": "safetensors",
                "sha256": sha256(folder / "tiny"), "in_features": [32, 64],
            }
        },
        "datasets": {
            "news": dataset("news"),
            "speeches": dataset("speeches"),
            "arithmetic": {
                "kind": "arithmetic", "seed": 0, "test": 4, "train": 0, "fewshot": 1,
                "levels": [{"name": "add", "operator": "+", "digits": 1, "carries": False}],
            },
        },
        "prune": {
            "magnitude-50": {
                "source": base, "method": "magnitude", "sparsity": 0.5, "scope": "matrix",
                "calibration": none,
            },
            "wanda-50": {"source": base, "method": "wanda", "sparsity": 0.5, "calibration": news},
        },
        "quantize": {
            "rtn-w4g32": {"source": base, "method": "rtn", "bits": 4, "group_size": 32, "calibration": none},
            "wanda-50-gptq-w4g32": {
                "source": "prune/wanda-50", "method": "gptq", "bits": 4, "group_size": 32,
                "calibration": news,
            },
        },
        "teach": {},
        "finetune": {
            "wanda-50-lora": {
                "source": "prune/wanda-50", "method": "lora", "train": news, "rank": 2, "alpha": 4,
                "learning_rate": 0.001, "steps": 2, "batch_size": 2,
            }
        },
        "noise": {"tiny-batch-3": {"source": base, "batch_size": 3}},
        "floor": {},
        "suites": {
            "perplexity": {"news": {"windows": 3, "sequence_length": 32, "batch_size": 2}},
            "graded": {"arithmetic": {"shots": 1, "batch_size": 2}},
            "benchmark": {},
        },
        "evaluate": {
            "candidates": [
                base, "noise/tiny-batch-3", "prune/magnitude-50", "prune/wanda-50", "quantize/rtn-w4g32",
                "quantize/wanda-50-gptq-w4g32", "finetune/wanda-50-lora",
            ]
        },
        "profile": {
            "candidates": [], "batch_sizes": [1, 2], "prompt_tokens": 8, "new_tokens": 4, "warmup": 1,
            "repeats": 3, "threads": 1,
        },
        "report": {"margin": 0.02, "reference": None},
        "studies": {},
    }  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Write the tiny model and the texts that `params` names."""
    folder.mkdir()
    families.save("llama", folder / "tiny")
    (folder / "news.txt").write_text(text(1))
    (folder / "speeches.txt").write_text(text(2))


def make(folder: Path, inputs: Path) -> Path:
    """Make a git and DVC project in `folder` with the real stages and a tiny sweep; return the folder."""
    folder.mkdir(parents=True)
    for name in ("stages", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    write(folder, params(inputs))
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "-q")
    commit(folder, "start")
    return folder


def write(folder: Path, values: dict[str, Any]) -> None:
    """Write params.yaml."""
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def read(folder: Path) -> dict[str, Any]:
    """Read params.yaml."""
    values: dict[str, Any] = yaml.safe_load((folder / "params.yaml").read_text())
    return values


def commit(folder: Path, message: str) -> None:
    """Commit everything git sees."""
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", message, "--allow-empty")


def run(folder: Path, *command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the project, its own code first on the path; assert its success unless told not to."""
    done = subprocess.run(
        command, cwd=folder, env={**ENV, **importing(folder)}, capture_output=True, text=True
    )
    if ok:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done

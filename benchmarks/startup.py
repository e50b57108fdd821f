"""The start-up time of stages in CPU seconds, over that of the imports nobody can avoid, all in one run.

    python -m benchmarks.startup          # in a project with its models and data sets (`dvc repro`)

- `python -m stages.<stage> --help` over `import torch`: every stage reads its params before it does anything.
- A recipe of params.yaml from the start of its process to the model's first block, over `import torch` and
  the model's own modeling module. Imports moved out of `--help` into the work count here.
- Stages without torch, to their end; `floor` only if params.yaml has a recipe for it.

Each line is a JSON object. Figures are the least of a few turns, since other processes can only add to them.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import tell
from stages.job.load import load
from stages.job.pieces import STAGES

TURNS = 5
WITHOUT_TORCH = (("validate",), ("noise", "smollm2-batch-5"))
"""Stages that need no torch, each with its recipe; they run to their end. `floor` is another."""
FORWARD = {
    "prune": "wanda-50",
    "quantize": "gptq-w4g64",
    "finetune": "wanda-50-lora",
    "evaluate": "base/smollm2/news",
}
"""Stages that run to the model's first block, each with its recipe."""
MODELING = "transformers.models.llama.modeling_llama"
UNTIL_BLOCK = """
import os, runpy, sys
from stages.core.lazy import importing
with importing():  # as the stage itself would
    import torch
from torch.nn.modules.module import register_module_forward_pre_hook

def stop(module, inputs):
    if type(module).__name__.endswith("DecoderLayer"):
        os._exit(0)

register_module_forward_pre_hook(stop)
stage, *arguments = sys.argv[1:]
sys.argv = [stage, *arguments]
runpy.run_module(f"stages.{stage}", run_name="__main__")
"""


def cpu_seconds(command: Sequence[str]) -> float:
    """Return the user and system time of a command, the least of a few turns.

    Raises:
        SystemExit: the command failed; the message ends with its errors.
    """
    times = []
    env = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(TURNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()[-500:]}")
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(times)


def main() -> None:
    """Print all figures."""
    python = sys.executable
    torch = cpu_seconds([python, "-c", "import torch"])
    modeling = cpu_seconds([python, "-c", f"import torch, {MODELING}"])
    tell("import torch, CPU seconds", torch)
    tell("import torch and the modeling module, CPU seconds", modeling)
    for stage in STAGES:
        seconds = cpu_seconds([python, "-m", f"stages.{stage}", "--help"])
        tell(f"{stage} --help, CPU seconds", seconds)
        tell(f"{stage} --help over import torch", seconds / torch)
    for stage, recipe in FORWARD.items():
        seconds = cpu_seconds([python, "-c", UNTIL_BLOCK, stage, recipe])
        tell(f"{stage} {recipe} to its first block, CPU seconds", seconds)
        tell(f"{stage} {recipe} to its first block over torch and modeling", seconds / modeling)
    floors = [("floor", name) for name in load().floor][:1]
    for stage, *arguments in (*WITHOUT_TORCH, *floors):
        seconds = cpu_seconds([python, "-m", f"stages.{stage}", *arguments])
        tell(f"{' '.join([stage, *arguments])}, CPU seconds", seconds)
    check = str(Path(python).with_name("prunequant"))
    tell("prunequant check, CPU seconds", cpu_seconds([check, "check"]))


if __name__ == "__main__":
    main()

"""The cost of orchestration: the flow, `dvc repro` and Snakemake over the same cheap stages, in CPU seconds.

    make bench-orchestration                                       # sets up Snakemake beside the project
    python -m benchmarks.orchestration --sizes 10 50 --snakemake .venv-snakemake/bin/snakemake

A project of N stages on a tiny model, nearly all of them `noise`, which only copies a checkpoint. Each tool
runs the same commands in a project of its own, from nothing (cold) and again with nothing to do (no-op).

- The stages' own work, each command run by itself, is left out of `cold_cpu_s_a_stage_above_its_work`.
- CPU seconds are those of the command and of all its descendants, Prefect's server included; they depend less
  than wall time on what else the machine does, but run it on an idle one.

DVC writes all of dvc.lock after each stage, so a cold run takes it time that grows with the square of N. Each
line is a JSON object.
"""

import argparse
import ctypes
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import show
from flows import graph
from tests import project

FIXED = 7
"""Stages of every project that are not `noise`: code, validate, model, data set, evaluation, tidy, report."""
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
RULES = """
import json
stages = json.load(open("stages.json"))
rule all:
    input: [f"done/{i}" for i in range(len(stages))]
for number, (command, upstream) in enumerate(stages):
    rule:
        name: f"stage{number}"
        input: [f"done/{up}" for up in upstream]
        output: touch(f"done/{number}")
        params: command=command
        shell: "{params.command}"
"""


def params(inputs: Path, stages: int) -> dict[str, Any]:
    """Return params with so many stages."""
    values = project.params(inputs)
    for section in ("prune", "quantize", "finetune"):
        values[section] = {}
    values["datasets"] = {"news": values["datasets"]["news"]}
    values["suites"]["perplexity"] = {"news": values["suites"]["perplexity"]["news"]}
    values["suites"]["graded"] = {}
    values["evaluate"]["candidates"] = ["base/tiny"]
    first = values["suites"]["perplexity"]["news"]["batch_size"] + 1
    values["noise"] = {
        f"n{i}": {"source": "base/tiny", "batch_size": first + i} for i in range(stages - FIXED)
    }
    return values


def make(folder: Path, inputs: Path, stages: int) -> None:
    """Make a project in which nothing has run, with the rules of Snakemake beside dvc.yaml."""
    project.make(folder, inputs)
    project.write(folder, params(inputs, stages))
    here = Path.cwd()
    os.chdir(folder)
    try:
        with graph.opened() as opened:
            whole = opened.graph()
    finally:
        os.chdir(here)
    if len(whole) != stages:
        raise SystemExit(f"the project has {len(whole)} stages instead of {stages}.")
    numbers = {name: number for number, name in enumerate(whole)}
    rules = [(stage.cmd, [numbers[up] for up in stage.upstream]) for stage in whole.values()]
    (folder / "stages.json").write_text(json.dumps(rules))
    (folder / "Snakefile").write_text(RULES)
    project.commit(folder, "cheap stages")


def cpu_seconds(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command; return the CPU seconds of it and all its descendants, and its wall seconds.

    Raises:
        SystemExit: the command failed; the message ends with its output.
    """
    env = {**project.ENV, "PYTHONPATH": str(folder), "TQDM_DISABLE": "1", "DVC_NO_ANALYTICS": "1"}
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wall = time.monotonic() - clock
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout.decode()[-1000:]}")
    while True:  # orphans have become children of this process
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def measure(tool: str, command: Sequence[str], stages: int, folder: Path, own: float) -> None:
    """Print a cold run and one with nothing to do."""
    cold, wall = cpu_seconds(command, folder)
    again, again_wall = cpu_seconds(command, folder)
    line = {
        "tool": tool,
        "stages": stages,
        "cold_cpu_s": round(cold, 1),
        "cold_wall_s": round(wall, 1),
        "cold_cpu_s_a_stage_above_its_work": round(cold / stages - own, 2),
        "noop_cpu_s": round(again, 1),
        "noop_wall_s": round(again_wall, 1),
    }
    show(json.dumps(line))


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration")
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 50, 200, 1000], help="stages")
    parser.add_argument("--snakemake", help="the program; without it Snakemake is left out")
    parser.add_argument("--folder", type=Path, help="where projects are made; default: a temporary folder")
    options = parser.parse_args()
    if min(options.sizes) <= FIXED:
        parser.error(f"--sizes has {min(options.sizes)}; a project has more than {FIXED} stages.")
    if options.snakemake and not shutil.which(options.snakemake):
        parser.error(f"there is no program {options.snakemake}; `make .venv-snakemake/ready` installs it.")
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    tools = {
        "dvc repro": ["dvc", "repro", "--quiet"],
        "prunequant run": ["prunequant", "run"],
    }
    if options.snakemake:
        program = str(Path(options.snakemake).resolve())
        tools["snakemake"] = [program, "--cores", str(len(os.sched_getaffinity(0))), "--quiet", "all"]
    with tempfile.TemporaryDirectory() as temporary:
        base = options.folder or Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        if not (base / "inputs").exists():
            project.write_inputs(base / "inputs")
        for stages in options.sizes:
            own = None
            for tool, command in tools.items():
                folder = base / f"{tool.split()[0]}-{stages}"
                make(folder, base / "inputs", stages)
                if own is None:
                    own = own_work(folder)
                    show(json.dumps({"stages": stages, "own_cpu_s_a_stage": round(own, 2)}))
                measure(tool, command, stages, folder, own)
                shutil.rmtree(folder)


def own_work(folder: Path) -> float:
    """Return the CPU seconds of all commands by themselves, a stage; put the project back as it was."""
    seconds: list[float] = []
    copies: list[float] = []
    rules = json.loads((folder / "stages.json").read_text())
    for command, _ in rules:
        copy = "stages.noise" in command
        if not copy or len(copies) < 3:
            (copies if copy else seconds).append(cpu_seconds(["sh", "-c", command], folder)[0])
    shutil.rmtree(folder / "data")
    return (sum(seconds) + min(copies) * (len(rules) - len(seconds))) / len(rules)


if __name__ == "__main__":
    main()

"""The cost of orchestration: the flow, `dvc repro` and Snakemake over the same cheap stages, in CPU seconds.

    make bench-orchestration                                       # sets up Snakemake beside the project
    python -m benchmarks.orchestration --sizes 10 50 --snakemake .venv-snakemake/bin/snakemake

A project of N stages on a tiny model, nearly all of them `noise`, which only copies a checkpoint. Each tool
runs the same commands, from nothing (cold, up to `--cold` stages) and with nothing to do (no-op).

- The stages' own work, each command run by itself, is left out of `cold_cpu_s_a_stage_above_its_work`.
- CPU seconds are those of the command and of all its descendants, Prefect's server included; they depend less
  than wall time on what else the machine does, but run it on an idle one.

DVC writes all of dvc.lock after each stage, so a cold run takes it time that grows with the square of N. Each
line is a JSON object.
"""

import argparse
import compileall
import contextlib
import ctypes
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import tell
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


FORKED = """
import json, os, runpy, shlex, sys
import torch, transformers  # once
for name, command in json.load(sys.stdin):
    os.environ["DVC_STAGE"] = name
    module, *arguments = [name if word == "$DVC_STAGE" else word for word in shlex.split(command)[2:]]
    child = os.fork()
    if not child:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} failed")
"""
"""Run stages one after another, each in a fork of a process that has imported what takes long."""


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


def make(folder: Path, inputs: Path, stages: int) -> graph.Graph:
    """Make a project in which nothing has run, with the rules of Snakemake; return its stages."""
    project.make(folder, inputs)
    project.write(folder, params(inputs, stages))
    with contextlib.chdir(folder):
        whole = graph.read_graph()
    if len(whole) != stages:
        raise SystemExit(f"the project has {len(whole)} stages instead of {stages}.")
    numbers = {name: number for number, name in enumerate(whole)}
    rules = [
        (script({name: stage.cmd})[-1], [numbers[up] for up in stage.upstream])
        for name, stage in whole.items()
    ]
    (folder / "stages.json").write_text(json.dumps(rules))
    (folder / "Snakefile").write_text(RULES)
    project.commit(folder, "cheap stages")
    return whole


def script(commands: Mapping[str, str]) -> list[str]:
    """Return a shell's command that runs stages by themselves; DVC tells a stage its name."""
    lines = [f"export DVC_STAGE={shlex.quote(name)}; {command}" for name, command in commands.items()]
    return ["sh", "-ec", "\n".join(lines)]


def finish(folder: Path, whole: graph.Graph) -> None:
    """Run all stages by themselves; lock a level of the graph at once, not a stage at a time as DVC does.

    Results note the locked hashes of their sources, so a level is locked before the next runs.
    """
    from dvc.repo import Repo, lock_repo

    for level in levels(whole):
        listed = json.dumps([(name, whole[name].cmd) for name in level])
        env = {**project.ENV, "PYTHONPATH": str(folder), "TQDM_DISABLE": "1"}
        subprocess.run(
            [sys.executable, "-c", FORKED], cwd=folder, env=env, input=listed, text=True, check=True
        )
        with contextlib.chdir(folder), Repo() as repo, lock_repo(repo):
            stages = [stage for stage in repo.index.stages if stage.addressing in level]
            for stage in stages:
                stage.save()
                stage.commit()
            stages[0].dvcfile.dump_stages(stages, update_pipeline=False)
    # As a first run leaves it: modules compiled, the windows of texts counted.
    compileall.compile_dir(folder / "flows", quiet=1)
    env = {**project.ENV, "PYTHONPATH": str(folder)}
    subprocess.run(["prunequant", "check"], cwd=folder, env=env, stdout=subprocess.DEVNULL, check=True)
    (folder / "done").mkdir()
    for number in range(len(whole)):  # what Snakemake looks at
        (folder / f"done/{number}").touch()


def levels(whole: graph.Graph) -> list[set[str]]:
    """Return the stages in sets, each of which needs nothing but the sets before it."""
    depth: dict[str, int] = {}
    for name, stage in whole.items():  # upstream stages come first
        depth[name] = 1 + max((depth[up] for up in stage.upstream), default=-1)
    return [{name for name in depth if depth[name] == level} for level in range(max(depth.values()) + 1)]


def cpu_seconds(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command; return the CPU seconds of it and all its descendants, and its wall seconds.

    Raises:
        SystemExit: the command failed; the message ends with its output.
    """
    env = {**project.ENV, "PYTHONPATH": str(folder), "TQDM_DISABLE": "1"}
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wall = time.monotonic() - clock
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout.decode()[-1000:]}")
    while True:  # orphans have become children of this process
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration")
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 50, 200, 1000], help="stages")
    parser.add_argument("--cold", type=int, default=200, help="run at most so many stages from nothing")
    parser.add_argument("--snakemake", help="the program; without it Snakemake is left out")
    options = parser.parse_args()
    if min(options.sizes) <= FIXED:
        parser.error(f"--sizes has {min(options.sizes)}; a project has more than {FIXED} stages.")
    if options.snakemake and not shutil.which(options.snakemake):
        parser.error(f"there is no program {options.snakemake}; `make .venv-snakemake/ready` installs it.")
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    tools = {"dvc repro": ["dvc", "repro"], "prunequant run": ["prunequant", "run"]}
    if options.snakemake:
        program = str(Path(options.snakemake).resolve())
        tools["snakemake"] = [program, "--cores", str(len(os.sched_getaffinity(0))), "--quiet", "all"]
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs"
        project.write_inputs(inputs)
        for stages in options.sizes:
            compare(tools, stages, Path(temporary), inputs, cold=stages <= options.cold)


def compare(tools: Mapping[str, Sequence[str]], stages: int, base: Path, inputs: Path, cold: bool) -> None:
    """Print the figures of every tool over so many stages."""
    folder = base / "project"
    whole = make(folder, inputs, stages)
    if cold:
        own = cpu_seconds(script({name: stage.cmd for name, stage in whole.items()}), folder)[0]
        tell(f"{stages} stages by themselves, CPU seconds", own)
    else:
        finish(folder, whole)
    for tool, command in tools.items():
        if cold:
            shutil.rmtree(folder)
            make(folder, inputs, stages)
            seconds, wall = cpu_seconds(command, folder)
            above = (seconds - own) / stages
            tell(f"{stages} stages, {tool}, cold, CPU seconds", seconds)
            tell(f"{stages} stages, {tool}, cold, wall seconds", wall)
            tell(f"{stages} stages, {tool}, cold, CPU seconds a stage above its work", above)
        seconds, wall = cpu_seconds(command, folder)
        tell(f"{stages} stages, {tool}, no-op, CPU seconds", seconds)
        tell(f"{stages} stages, {tool}, no-op, wall seconds", wall)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

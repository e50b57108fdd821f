"""Evaluation against lm-eval's own command, on the same tasks and model, all in one run.

    dvc repro model@smollm2 dataset@arithmetic
    python -m benchmarks.evaluation                    # the graded suite arithmetic of params.yaml
    python -m benchmarks.evaluation --suite brackets   # another graded suite, whose data set must exist

Our side is `python -m stages.evaluate`, theirs `lm-eval run` with the tasks written as YAML. Both are whole
commands in new processes, timed with imports, loading and writing, with the same batch size and threads. They
take turns, `--runs` times; figures are medians. In float32 no score of an item may differ, which
`graded.scores_identical` tells. Log-likelihoods differ by rounding, at most by
`graded.log_likelihood_difference` nats.

Each line is a JSON object. The aim: `graded.times_faster_than_lm_eval` at least 2.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from ruamel.yaml import YAML

from benchmarks.figures import tell
from stages.core.lazy import torch
from stages.core.tables import SAMPLES
from stages.evaluation.graded import GradedSuite
from stages.evaluation.room import usual_rows

ROOT = Path(__file__).parents[1]
MODEL = Path("data/models/base/smollm2")
SUITE = Path("suite.json")
"""The suite's name and settings, from which `task` builds the tasks."""


class Function:
    """A function that a task's YAML names."""

    def __init__(self, name: str) -> None:
        self.name = name


class Dumper(yaml.SafeDumper):
    """Write functions as lm-eval reads them."""


Dumper.add_representer(Function, lambda dumper, function: dumper.represent_scalar("!function", function.name))


def task(number: int, key: str) -> Any:
    """Return a function of the suite's task `number`; the modules beside the YAML files import it by this."""
    suite = json.loads(SUITE.read_text())
    settings = GradedSuite.model_validate(suite["settings"])
    return settings.tasks(suite["name"], settings.asked())[number][key]


def write_tasks(suite: GradedSuite, name: str, folder: Path) -> list[str]:
    """Write the suite's tasks as YAML into `folder`, whose parent must be the working folder of lm-eval.

    Returns:
        The tasks' names.
    """
    folder.mkdir()
    names = []
    for number, config in enumerate(suite.tasks(name, suite.asked())):
        functions = [key for key, value in config.items() if callable(value)]
        module = f"functions_{number}"
        lines = ["from benchmarks.evaluation import task", ""]
        lines += [f"{key} = task({number}, {key!r})" for key in functions]
        (folder / f"{module}.py").write_text("\n".join(lines) + "\n")
        written = {**config, **{key: Function(f"{module}.{key}") for key in functions}}
        (folder / f"{config['task']}.yaml").write_text(yaml.dump(written, Dumper=Dumper, sort_keys=False))
        names.append(config["task"])
    return names


def project(folder: Path, params: dict[str, Any], suite: str, run: dict[str, Any]) -> None:
    """Set up a project with the model and a single suite in `folder`.

    Args:
        run: settings of section `run`, in place of those of `params`.
    """
    reduced = {section: {} if isinstance(value, dict) else value for section, value in params.items()}
    reduced["run"] = {**params["run"], **run}
    reduced["models"] = {"smollm2": params["models"]["smollm2"]}
    reduced["datasets"] = {suite: params["datasets"][suite]}
    reduced["suites"] = {"graded": {suite: params["suites"]["graded"][suite]}}
    reduced["evaluate"] = {"candidates": ["base/smollm2"]}
    reduced["profile"] = {**params["profile"], "candidates": []}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(reduced, file)
    for path in (MODEL, Path("data/datasets") / suite):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(path.resolve())


def run(command: list[str], folder: Path, threads: int) -> float:
    """Run a command in `folder` and return its wall time in seconds.

    Raises:
        SystemExit: it failed; the message ends with its output.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return took


def ours(folder: Path, suite: str) -> pd.DataFrame:
    """Return our answers: `task`, `doc_id`, `score`, `likelihoods`."""
    samples = pd.read_parquet(folder / f"data/results/base/smollm2/{suite}" / SAMPLES)
    samples["task"] = suite + "-" + samples["readout"]
    return samples.rename(columns={"log_likelihoods": "likelihoods"})


def theirs(folder: Path) -> pd.DataFrame:
    """Return lm-eval's answers, in the same columns."""
    rows = []
    for file in sorted(folder.rglob("samples_*.jsonl")):
        name = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        for line in file.read_text().splitlines():
            item = json.loads(line)
            (metric,) = item["metrics"]
            likelihoods = [float(pair[0]) for pair in item["filtered_resps"]] if metric == "acc" else None
            row = {"task": name, "doc_id": item["doc_id"], "score": float(item[metric])}
            rows.append({**row, "likelihoods": likelihoods})
    return pd.DataFrame(rows)


def compare(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[bool, float]:
    """Return whether both sides have all items with the same score, and the largest difference in nats."""
    both = ours.merge(theirs, on=["task", "doc_id"], suffixes=("_ours", "_theirs"))
    complete = len(both) == len(ours) == len(theirs) > 0
    differences = [
        abs(our - their)
        for our_item, their_item in zip(both["likelihoods_ours"], both["likelihoods_theirs"], strict=True)
        if our_item is not None
        for our, their in zip(our_item, their_item, strict=True)
    ]
    same = bool((both["score_ours"] == both["score_theirs"]).all())
    return complete and same, max(differences, default=0.0)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--suite", default="arithmetic", help="a graded suite of params.yaml")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    params = YAML(typ="safe", pure=True).load(options.params.read_text())
    graded = params["suites"].get("graded", {})
    if options.suite not in graded:
        raise SystemExit(f"{options.params} has no graded suite {options.suite}, only {', '.join(graded)}.")
    needed = {"model@smollm2": MODEL, f"dataset@{options.suite}": Path("data/datasets") / options.suite}
    if missing := [stage for stage, path in needed.items() if not path.exists()]:
        raise SystemExit(f"model or data are missing; run dvc repro {' '.join(missing)}.")
    settings = graded[options.suite]
    suite = GradedSuite.model_validate(settings)
    scripts = Path(sys.executable).parent
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / SUITE).write_text(json.dumps({"name": options.suite, "settings": settings}))
        run_settings = {"device": options.device, "dtype": options.dtype, "threads": options.threads}
        project(folder, params, options.suite, run_settings)
        tasks = write_tasks(suite, options.suite, folder / "tasks")
        arguments = f"pretrained={MODEL},dtype={options.dtype},softmax_dtype=float32"
        batch_size = suite.batch_size or usual_rows(torch.device(options.device))
        command = [
            str(scripts / "lm-eval"), "run", "--model", "hf", "--model_args", arguments,
            "--device", options.device, "--include_path", "tasks", "--batch_size", str(batch_size),
            "--log_samples", "--output_path", "theirs", "--tasks", *tasks,
        ]  # fmt: skip
        if suite.chat_template:
            command += ["--apply_chat_template"]
        stage = [sys.executable, "-m", "stages.evaluate", f"base/smollm2/{options.suite}"]
        run([sys.executable, "-m", "stages.code"], folder, options.threads)
        for _ in range(options.runs):
            seconds["ours"].append(run(stage, folder, options.threads))
            shutil.rmtree(folder / "theirs", ignore_errors=True)
            seconds["theirs"].append(run(command, folder, options.threads))
        identical, difference = compare(ours(folder, options.suite), theirs(folder / "theirs"))
    our_seconds, their_seconds = (statistics.median(seconds[side]) for side in ("ours", "theirs"))
    tell("graded.seconds", our_seconds)
    tell("graded.seconds_lm_eval", their_seconds)
    tell("graded.times_faster_than_lm_eval", their_seconds / our_seconds)
    tell("graded.scores_identical", identical)
    tell("graded.log_likelihood_difference", difference)


if __name__ == "__main__":
    main()

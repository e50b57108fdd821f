"""Evaluation against lm-eval's own command: the same tasks, the same model, all in one run.

    dvc repro model@smollm2 dataset@arithmetic
    python -m benchmarks.evaluation                    # the graded suite of params.yaml
    python -m benchmarks.evaluation --suite brackets   # another one of it, its data set made before

Ours is `python -m stages.evaluate`, theirs `lm-eval run` with the tasks written out as it reads them. Both
are whole commands, started anew, with imports, loading and writing inside the clock; both have the same
batch size and threads. They take turns, `--runs` times, and medians are told. In float32 no score of an
item may differ; that is what `graded.scores_identical` says. Log-likelihoods differ by rounding,
`graded.log_likelihood_difference` nats at most.

One JSON object a line. The aim: `graded.times_faster_than_lm_eval` 2 at least.
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
from stages.core.tables import SAMPLES
from stages.evaluation.graded import GradedSuite

ROOT = Path(__file__).parents[1]
MODEL = Path("data/models/base/smollm2")
CONFIGS = Path("tasks.json")
"""What `task` makes the tasks from: the suite's name and settings."""


class Function:
    """A function that a YAML file of lm-eval's names."""

    def __init__(self, name: str) -> None:
        self.name = name


class Dumper(yaml.SafeDumper):
    """Writes functions as lm-eval reads them."""


Dumper.add_representer(Function, lambda dumper, one: dumper.represent_scalar("!function", one.name))


def task(number: int, key: str) -> Any:
    """A function of the suite's task `number`; the modules beside the YAML files import theirs by this."""
    told = json.loads(CONFIGS.read_text())
    return GradedSuite.model_validate(told["settings"]).tasks(told["suite"])[number][key]


def write_tasks(suite: GradedSuite, name: str, folder: Path) -> list[str]:
    """Write the suite's tasks as YAML into `folder`, to be read with `folder`'s parent as working folder."""
    folder.mkdir()
    names = []
    for number, config in enumerate(suite.tasks(name)):
        functions = [key for key, value in config.items() if callable(value)]
        module = f"functions_{number}"
        lines = ["from benchmarks.evaluation import task", ""]
        lines += [f"{key} = task({number}, {key!r})" for key in functions]
        (folder / f"{module}.py").write_text("\n".join(lines) + "\n")
        written = {**config, **{key: Function(f"{module}.{key}") for key in functions}}
        (folder / f"{config['task']}.yaml").write_text(yaml.dump(written, Dumper=Dumper, sort_keys=False))
        names.append(config["task"])
    return names


def project(folder: Path, params: dict[str, Any], suite: str, threads: int, dtype: str) -> None:
    """A project with the model and one suite, in `folder`."""
    kept = {section: {} if isinstance(value, dict) else value for section, value in params.items()}
    kept["run"] = {**params["run"], "device": "cpu", "dtype": dtype, "threads": threads}
    kept["models"] = {"smollm2": params["models"]["smollm2"]}
    kept["datasets"] = {suite: params["datasets"][suite]}
    kept["suites"] = {kind: {} for kind in params["suites"]} | {
        "graded": {suite: params["suites"]["graded"][suite]}
    }
    kept["evaluate"] = {"candidates": ["base/smollm2"]}
    kept["profile"] = {**params["profile"], "candidates": []}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(kept, file)
    for path in (MODEL, Path("data/datasets") / suite):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(path.resolve())


def run(command: list[str], folder: Path, threads: int) -> float:
    """Wall time of a command in `folder`, in seconds.

    Raises:
        SystemExit: it failed; the message has the end of what it said.
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
    """Our answers: `task`, `doc_id`, `score`, `likelihoods`."""
    found = pd.read_parquet(folder / f"data/results/base/smollm2/{suite}" / SAMPLES)
    found["task"] = suite + "-" + found["readout"]
    return found.rename(columns={"log_likelihoods": "likelihoods"})


def theirs(folder: Path) -> pd.DataFrame:
    """lm-eval's answers, in the same columns."""
    rows = []
    for file in sorted(folder.rglob("samples_*.jsonl")):
        name = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        for line in file.read_text().splitlines():
            item = json.loads(line)
            (metric,) = item["metrics"]
            likelihoods = [float(one[0]) for one in item["filtered_resps"]] if metric == "acc" else None
            row = {"task": name, "doc_id": item["doc_id"], "score": float(item[metric])}
            rows.append({**row, "likelihoods": likelihoods})
    return pd.DataFrame(rows)


def compare(one: pd.DataFrame, other: pd.DataFrame) -> tuple[bool, float]:
    """Whether all items are there on both sides with the same score; the largest difference in nats."""
    both = one.merge(other, on=["task", "doc_id"], suffixes=("_one", "_other"))
    whole = len(both) == len(one) == len(other) > 0
    apart = [
        abs(a - b)
        for a_item, b_item in zip(both["likelihoods_one"], both["likelihoods_other"], strict=True)
        if a_item is not None
        for a, b in zip(a_item, b_item, strict=True)
    ]
    return whole and bool((both["score_one"] == both["score_other"]).all()), max(apart, default=0.0)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--suite", default="arithmetic", help="a graded suite of the params")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    params = YAML(typ="safe", pure=True).load(options.params.read_text())
    if options.suite not in params["suites"]["graded"]:
        raise SystemExit(f"{options.params} has no graded suite {options.suite}.")
    needed = {"model@smollm2": MODEL, f"dataset@{options.suite}": Path("data/datasets") / options.suite}
    if missing := [stage for stage, path in needed.items() if not path.exists()]:
        raise SystemExit(f"run dvc repro {' '.join(missing)} first.")
    settings = params["suites"]["graded"][options.suite]
    suite = GradedSuite.model_validate(settings)
    scripts = Path(sys.executable).parent
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / CONFIGS).write_text(json.dumps({"suite": options.suite, "settings": settings}))
        project(folder, params, options.suite, options.threads, options.dtype)
        tasks = write_tasks(suite, options.suite, folder / "tasks")
        arguments = f"pretrained={MODEL},dtype={options.dtype},softmax_dtype=float32"
        command = [
            str(scripts / "lm-eval"), "run", "--model", "hf", "--model_args", arguments, "--device", "cpu",
            "--include_path", "tasks", "--batch_size", str(suite.batch_size), "--log_samples",
            "--output_path", "theirs", "--tasks", *tasks,
        ]  # fmt: skip
        if suite.chat_template:
            command += ["--apply_chat_template"]
        stage = [sys.executable, "-m", "stages.evaluate", f"base/smollm2/{options.suite}"]
        for _ in range(options.runs):
            seconds["ours"].append(run(stage, folder, options.threads))
            shutil.rmtree(folder / "theirs", ignore_errors=True)
            seconds["theirs"].append(run(command, folder, options.threads))
        identical, apart = compare(ours(folder, options.suite), theirs(folder / "theirs"))
    mine, other = (statistics.median(seconds[side]) for side in ("ours", "theirs"))
    tell("graded.seconds", mine)
    tell("graded.seconds_lm_eval", other)
    tell("graded.times_faster_than_lm_eval", other / mine)
    tell("graded.scores_identical", identical)
    tell("graded.log_likelihood_difference", apart)


if __name__ == "__main__":
    main()

"""A device under test: does it give what the CPU gives, twice the same, and how near is it to its limits.

    python -m benchmarks.device                              # on a card, less than 5 minutes, no network
    python -m benchmarks.device --only table --blocks 3      # a part of it
    python -m benchmarks.device --only table --blocks 32 --rows gptq-w4 --memory 24   # 8B on a card of 24 GiB
    python -m benchmarks.device --only table --blocks 3 --hidden 8192                 # 70B's blocks
    python -m benchmarks.device --only training --blocks 32 --memory 80               # LoRA of 8B
    python -m benchmarks.device --device cpu --hidden 64 --blocks 2 --samples 4 --length 32 --side 64

Five parts, each with a share of the time; a case for which none is left is skipped with a line that says so.
Without `--only`, all but `training` run.

- `parity`: every method that changes one weight at a time, on the CPU and on the device, from the same
  random model: the share of mask entries, or of codes, that differ, and by how much the perplexity does.
  `METHODS` says how much may. With a GGUF file of SmolLM2 (`--model`) some of them run on that as well.
- `determinism`: every stage twice from nothing; all files must have the same bytes.
- `resume`: a stage in a process of its own, killed after a block or a step and run again; the result must
  have the bytes of an undisturbed one.
- `table`: stages on random blocks in the shape of Llama-3.1-8B, with its embedding and head.
  `seconds_per_block` is the time from the begin of a block to that of the next in the stage's own walk,
  `start` the time up to the first block, `end` all that is left. `limit` is the least time for a block whose
  bytes are in memory (`benchmarks.limits`), at the rates of a product and of copies that are measured first;
  `disk` is the time to read and write its bytes with the best number of threads.
- `training`: LoRA of the same random model, half of whose weights were pruned, with the mask of its zeros and
  without: seconds a step, and what the mask adds.

`--memory` lets torch have no more of the card. It keeps the size of the card itself in sight of the program.

Each line is a JSON object; a plain table follows. The exit code is 1 if a bound is broken or a case failed,
and 2 if none did and cases were skipped.
"""

import argparse
import ast
import gc
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig

from benchmarks.checkpoint import write_random
from benchmarks.figures import show
from benchmarks.limits import BlockWork, Limits, measure
from stages.core.files import DATASETS, MODELS, SCRATCH, sha256
from stages.core.run import Run
from stages.job.params import methods
from stages.model.artifact import load_model, load_tokenizer
from stages.model.packed import code_from
from stages.model.shards import Shards
from stages.model.stream import Streamed
from stages.profiling.energy import Meter
from stages.recovery import training as loop
from stages.recovery.recover import recover
from stages.recovery.saves import Checkpoints
from stages.recovery.training import take_step
from stages.sources.gguf import Gguf
from stages.sources.text import Text
from tests import families, pipeline, project

Settings = dict[str, Any]

NONE: Settings = {"dataset": "none"}
RANDOM: Settings = NONE | {"tokens": "random", "seed": 5}
"""Calibration tokens that need no data set; the number and length of the windows are added."""
INT4: Settings = {"bits": 4, "group_size": 32}


class Bound(NamedTuple):
    """How far a method's result on another device may be from the CPU's."""

    share: float
    """Of mask entries or codes that differ."""
    perplexity: float
    """Relative difference."""


EXACT, SUMMED, SWEPT = Bound(0, 0), Bound(0.002, 0.01), Bound(0.1, 0.02)
"""No sum decides; sums over tokens decide near-ties; every choice changes those that follow."""


class Compared(NamedTuple):
    """A method as `parity` runs it."""

    stage: str
    settings: Settings
    bound: Bound

    def recipe(self, name: str, source: str, windows: Settings) -> Any:
        """Return the checked recipe of the method `name`."""
        return recipe_of(self.stage, name, self.settings, source, windows)


METHODS: dict[str, Compared] = {
    "magnitude": Compared("prune", {"sparsity": 0.5, "scope": "matrix", "calibration": NONE}, EXACT),
    "random": Compared("prune", {"sparsity": 0.5, "seed": 0, "calibration": NONE}, EXACT),
    "wanda": Compared("prune", {"sparsity": 0.5, "calibration": RANDOM}, SUMMED),
    "sparsegpt": Compared("prune", {"sparsity": 0.5, "calibration": RANDOM}, SWEPT),
    "rtn": Compared("quantize", INT4 | {"calibration": NONE}, EXACT),
    "gptq": Compared("quantize", INT4 | {"calibration": RANDOM}, SWEPT),
    "awq": Compared("quantize", INT4 | {"calibration": RANDOM | {"sequential": "block"}}, SWEPT),
    "smoothquant": Compared("quantize", {"calibration": RANDOM | {"sequential": "block"}}, SWEPT),
    "hqq": Compared("quantize", INT4 | {"calibration": NONE}, SUMMED),
    "nf4": Compared("quantize", {"group_size": 32, "calibration": NONE}, EXACT),
    "fp8": Compared("quantize", {"calibration": NONE}, EXACT),
    "mxfp4": Compared("quantize", {"calibration": NONE}, EXACT),
    "nvfp4": Compared("quantize", {"calibration": NONE}, EXACT),
}
"""Stage, settings and bound of every method that changes one weight at a time."""
SMOLLM2 = "base/smollm2"
ON_SMOLLM2: dict[str, Bound] = {
    "magnitude": EXACT, "rtn": EXACT,
    "wanda": Bound(0.01, 0.022), "sparsegpt": Bound(0.15, 0.022), "gptq": Bound(0.4, 0.13),
}  # fmt: skip
"""The methods that run on SmolLM2 as well, and their bounds there; the rest would take a CPU too long.

No device is at fault where they differ: two kinds of kernel of one CPU differ there as well, from the first
near-tie that is decided otherwise, and more from block to block. The bounds are about twice what artifacts
differed by that were made once with AVX-512 and bf16 products, and once under ONEDNN_MAX_CPU_ISA=AVX512_CORE
ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2.
"""
ENGLISH: Settings = {
    "dataset": "english", "tokens": "text", "seed": None, "num_samples": 8, "sequence_length": 128,
}  # fmt: skip
"""Calibration on SmolLM2. It reads text, as kernels differ more after random tokens."""


class Row(NamedTuple):
    """A row of the table."""

    stage: str
    method: str
    settings: Settings
    aim: float
    """Seconds a block of the 8B shape on an H100 or H200."""
    hessians: bool = False


ROWS: dict[str, Row] = {
    "magnitude-50": Row("prune", "magnitude", METHODS["magnitude"].settings, 0.25),
    "wanda-50-dense": Row(
        "prune", "wanda", {"sparsity": 0.5, "calibration": RANDOM | {"sequential": "none"}}, 0.45
    ),
    "wanda-50": Row("prune", "wanda", {"sparsity": 0.5, "calibration": RANDOM}, 0.45),
    "sparsegpt-50": Row("prune", "sparsegpt", {"sparsity": 0.5, "calibration": RANDOM}, 1.3, True),
    "gptq-w4": Row("quantize", "gptq", {"bits": 4, "calibration": RANDOM}, 1.3, True),
}
SMALL, BIG = "base/small", "base/big"
WINDOWS: Settings = {"num_samples": 32, "sequence_length": 64}
"""Calibration on the small model."""
KILLED = ("magnitude", "wanda", "sparsegpt", "gptq")
_TRAIN: Settings = {
    "train": {"dataset": "news", "num_samples": 4, "sequence_length": 32}, "learning_rate": 0.001, "steps": 4,
    "batch_size": 2, "checkpoint_every": 1,
}  # fmt: skip
TRAININGS: dict[str, Settings] = {"full": _TRAIN, "lora": _TRAIN | {"rank": 2, "alpha": 4}}
SHARES = {"parity": 0.2, "determinism": 0.1, "resume": 0.15, "table": 0.55, "training": 0.5}
"""What part of the time a part may take beside the parts after it; what it leaves goes to the next."""
HALF = "prune/half"
ADAPTED: Settings = {
    "source": HALF, "method": "lora", "rank": 16, "alpha": 16, "learning_rate": 1e-4, "steps": 6,
    "gradient_checkpointing": True,
}  # fmt: skip
"""A training of the part `training`; the first step does not count."""


class Report:
    """The lines printed so far, and whether all is well."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.sound = options, True
        self.lines: list[dict[str, Any]] = []
        self._end = self._deadline = time.monotonic() + options.seconds

    def exit_code(self) -> int:
        """Return 1 if something is wrong, else 2 if something was not tried, else 0."""
        return 1 if not self.sound else 2 if any("skipped" in line for line in self.lines) else 0

    def give(self, share: float) -> None:
        """Begin a part that may take a share of the time that is left."""
        now = time.monotonic()
        self._deadline = now + share * (self._end - now)

    def tell(self, part: str, case: str, /, **facts: Any) -> None:
        """Print a line."""
        line = {"part": part, "case": case, **facts}
        self.lines.append(line)
        show(json.dumps(line))

    def case(self, part: str, case: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Do a case and print what it gives; one that fails, or has no time left, is a line as well.

        A case is sound unless its facts say `ok: false`.
        """
        if time.monotonic() > self._deadline:
            self.tell(part, case, skipped="no time left; raise --seconds, or choose parts with --only")
            return
        start = time.perf_counter()
        try:
            facts = dict(work())
        except Exception as error:
            self.sound = False
            sys.stderr.write(traceback.format_exc())
            self.tell(part, case, error=f"{type(error).__name__}: {str(error)[:300]}")
            return
        self.sound &= facts.get("ok", True)
        self.tell(part, case, **facts, took=round(time.perf_counter() - start, 2))


def recipe_of(section: str, method: str, settings: Settings, source: str, windows: Settings) -> Any:
    """Return a checked recipe; a calibration that reads tokens gets the number and length of `windows`."""
    text = settings["calibration"]
    calibration = text | windows if "tokens" in text else text
    raw = {"source": source, "method": method, **settings, "calibration": calibration}
    return methods(section)[method].model_validate(raw)


def llama(hidden: int, blocks: int, length: int, vocabulary: int = families.VOCAB) -> LlamaConfig:
    """Return a config in the proportions of Llama-3.1-8B (`hidden` 4096) with a vocabulary of any size."""
    head = min(128, hidden // 4)
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_attention_heads=hidden // head,
        num_key_value_heads=max(1, hidden // head // 4), head_dim=head, num_hidden_layers=blocks,
        vocab_size=vocabulary, max_position_embeddings=max(length, 256), tie_word_embeddings=False,
        dtype="bfloat16", bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip


def run_on(device: str) -> Run:
    """Return the settings of a run, with a thread a core."""
    return Run(device=device, dtype="bfloat16", threads=os.cpu_count() or 1, seed=0, numerics="fast")


def make(artifact: str, recipe: Any, run: Run) -> None:
    """Make an artifact as its stage does."""
    run.start()
    if artifact.startswith("finetune/"):
        recover(recipe, run, artifact.removeprefix("finetune/"))
    else:
        recipe.execute(artifact, run)


def choices(artifact: str) -> dict[str, Tensor]:
    """Return each linear's codes if it is packed, else its zeros if it was pruned, else its values."""
    folder = MODELS / artifact
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    stored = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    if config:
        scheme = {**config["config_groups"]["group_0"], "format": config["format"]}
        names = [name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")]
        codes = {name: code_from(stored, name, scheme) for name in names}
        return {name: code.codes.float() for name, code in codes.items()}  # type: ignore[attr-defined]
    names = [name for name in stored if ".layers." in name and stored[name].ndim == 2]
    return {name: stored[name] == 0 if artifact.startswith("prune/") else stored[name] for name in names}


def loss(artifact: str, device: str, windows: Tensor) -> float:
    """Return the mean loss of an artifact in fp32."""
    run = run_on(device).model_copy(update={"dtype": "float32"})
    model, total = load_model(artifact, run, dequantize=True), 0.0
    with torch.no_grad():
        for batch in windows.to(model.device).split(8):
            logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].numel()


def parity(report: Report, folder: Path) -> None:
    """Compare every method's result on the device with the CPU's, on a small model and on SmolLM2."""
    device = report.options.device
    held_out = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(9))
    for name, entry in METHODS.items():
        work = partial(compared, device, SMALL, name, WINDOWS, held_out, entry.bound)
        report.case("parity", f"{SMALL}/{name}", work)
    if not report.options.model:
        return
    report.case("parity", SMOLLM2, partial(download_smollm2, report.options.model))
    if (MODELS / SMOLLM2).exists():
        held_out = held_out_english()
        for name, bound in ON_SMOLLM2.items():
            work = partial(compared, device, SMOLLM2, name, ENGLISH, held_out, bound)
            report.case("parity", f"{SMOLLM2}/{name}", work)


def compared(
    device: str, source: str, name: str, windows: Settings, held_out: Tensor, bound: Bound
) -> dict[str, Any]:
    """Run a method on the CPU and on the device, and compare its choices and the losses.

    Args:
        windows: the calibration's settings, for a method that reads tokens.
        held_out: `[n, tokens]` token ids that the losses are taken on.
    """
    section = METHODS[name].stage
    recipe = METHODS[name].recipe(name, source, windows)
    losses, chosen = [], []
    for where in ("cpu", device):
        artifact = f"{section}/{name}-parity-{where.replace(':', '-')}"
        make(artifact, recipe, run_on(where))
        losses.append(loss(artifact, device, held_out))
        chosen.append(choices(artifact))
    ours, theirs = chosen
    differ = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    share = differ / sum(tensor.numel() for tensor in ours.values())
    ratio = abs(math.expm1(losses[1] - losses[0]))
    ok = share <= bound.share and ratio <= bound.perplexity
    return {"share": share, "perplexity": ratio, "bound": bound._asdict(), "ok": ok}


def download_smollm2(file: Path) -> dict[str, Any]:
    """Make `base/smollm2` of its GGUF file, and the data set `english` beside it."""
    raw: dict[str, Any] = {
        "source": f"path:{file.parent}", "format": "gguf", "file": file.name, "sha256": sha256(file),
        "in_features": (576, 1536),
    }  # fmt: skip
    Gguf.model_validate(raw).download("smollm2", run_on("cpu"))
    write_text("english", english(), "paragraphs")
    return {}


def write_text(name: str, text: str, documents: str) -> None:
    """Make a data set of a text."""
    folder = Path(name)
    folder.mkdir()
    (folder / f"{name}.txt").write_text(text)
    raw = {
        "source": f"path:{folder}", "file": f"{name}.txt", "sha256": sha256(folder / f"{name}.txt"),
        "kind": "text", "documents": documents, "calibration": 0.5,
    }  # fmt: skip
    Text.model_validate(raw).download(name)


def english() -> str:
    """Return the docstrings of the product's modules, English wherever the benchmark runs."""
    files = sorted(project.ROOT.joinpath("stages").rglob("*.py"))
    return "\n\n".join(ast.get_docstring(ast.parse(file.read_text())) or "" for file in files)


def held_out_english() -> Tensor:
    """Return 16 windows of 128 tokens, `[16, 128]`, of the text that no calibration reads."""
    count, length = 16, ENGLISH["sequence_length"]
    text = "\n\n".join(pd.read_parquet(DATASETS / "english" / "evaluation.parquet")["text"])
    ids = load_tokenizer(SMOLLM2)(text)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def files_of(root: Path) -> dict[str, str]:
    """Return the sha256 of every file that a project computed, but of measured times."""
    left_out = ("runs", "scratch", "profile")
    return {
        str(file.relative_to(root)): sha256(file)
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.relative_to(root).parts[0] not in left_out
    }


def whole_project(device: str, folder: Path, inputs: Path) -> dict[str, str]:
    """Run every stage once in `folder`, each recipe after its source, and hash all files.

    `profile` measures times, and `report` runs where matplotlib is.
    """
    folder.mkdir()
    (folder / "inputs").symlink_to(inputs)
    with chdir(folder), mock.patch.object(families, "DEVICE", device):
        raw = project.params(Path("inputs"))
        raw["teach"]["taught"] = {
            "source": "base/tiny", "method": "logits", "dataset": "news", "num_samples": 4,
            "sequence_length": 32, "held_out": 2, "top": 8, "batch_size": 2,
        }  # fmt: skip
        del raw["datasets"]["arithmetic"]  # its library may be missing where a card is
        raw["datasets"]["brackets"] = {
            "kind": "brackets", "seed": 0, "test": 4, "train": 0, "fewshot": 1,
            "levels": [{"name": "two", "depth": 2, "kinds": 2}],
        }  # fmt: skip
        raw["suites"]["graded"] = {"brackets": {"shots": 1, "batch_size": 2}}
        raw["floor"]["dot"] = {"source": "base/tiny", "responder": "dot"}
        raw["evaluate"]["candidates"].append("floor/dot")
        params = pipeline.checked(raw)
        pipeline.validate(params, "all")
        for name in (*(f"datasets/{key}" for key in params.datasets), "base/tiny"):
            pipeline.download(params, name)
        for artifact in params.recipes():
            section, name = artifact.split("/")
            pipeline.STAGES[section](params, name)
        for name in params.evaluations():
            pipeline.evaluate(params, name)
        if find_spec("matplotlib"):
            pipeline.report(params, "all")
        return files_of(Path("data"))


def determinism(report: Report, folder: Path) -> None:
    """Run all stages twice and compare the bytes."""

    def twice() -> dict[str, Any]:
        device, inputs = report.options.device, folder / "inputs"
        runs = [whole_project(device, folder / name, inputs) for name in ("first", "second")]
        return {"files": len(runs[0]), **same(*runs)}

    report.case("determinism", "every stage", twice)


def same(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, Any]:
    """Return the names of files whose hashes differ, and whether there are none."""
    differ = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
    return {"differ": differ, "ok": not differ}


def _killed(artifact: str, recipe: Any, run: Run, folder: Path) -> None:
    """Make an artifact in `folder`, and be killed as soon as a block, or a checkpoint, is finished."""
    os.chdir(folder)
    logging.disable(logging.WARNING)
    for owner, name in ((Shards, "finish"), (Checkpoints, "save")):
        _kill_after(owner, name)
    make(artifact, recipe, run)


def _kill_after(owner: Any, name: str) -> None:
    """Kill this process after a method's next call."""
    plain = getattr(owner, name)

    def last(*args: Any) -> None:
        plain(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, last)


def resume(report: Report, _: Path) -> None:
    """Kill methods after a block, and trainings after a checkpoint; run them again and compare the bytes."""
    run, spawn = run_on(report.options.device), multiprocessing.get_context("spawn")
    recipes = {
        f"{METHODS[name].stage}/{name}-killed": METHODS[name].recipe(name, SMALL, WINDOWS) for name in KILLED
    }
    for name, settings in TRAININGS.items():
        recipe = methods("finetune")[name].model_validate({"source": SMALL, "method": name, **settings})
        recipes[f"finetune/{name}-killed"] = recipe
    children = {
        artifact: spawn.Process(target=_killed, args=(artifact, recipe, run, Path.cwd()))
        for artifact, recipe in recipes.items()
    }
    for child in children.values():  # side by side, as each takes seconds to start
        child.start()

    def resumed(artifact: str) -> dict[str, Any]:
        children[artifact].join()
        places = (SCRATCH / "resume" / artifact.replace("/", "__"), SCRATCH / artifact)
        kept = sum(file.is_file() for place in places for file in place.rglob("*"))
        hashes = []
        for _ in ("resumed", "undisturbed"):
            make(artifact, recipes[artifact], run)
            hashes.append(files_of(MODELS / artifact))
            shutil.rmtree(MODELS / artifact)
        facts = same(*hashes)
        killed = children[artifact].exitcode == -signal.SIGKILL and kept > 0
        return {"killed": killed, "files_kept": kept, **facts, "ok": killed and facts["ok"]}

    for artifact in recipes:
        report.case("resume", artifact, partial(resumed, artifact))
    for child in children.values():
        child.kill()
        child.join()


@contextmanager
def block_times() -> Iterator[list[float]]:
    """Collect the clock at the begin of every block that a streamed model passes."""
    begun: list[float] = []
    plain = Streamed.block

    @contextmanager
    def timed(self: Streamed, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        begun.append(time.perf_counter())
        with plain(self, name, block, dense=dense) as done:
            yield done

    with mock.patch.object(Streamed, "block", timed):
        yield begun


class Peak:
    """The most memory in use while the body runs: torch's own, and the whole card's ten times a second."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.card, self._stop = device, 0, Event()

    def __enter__(self) -> "Peak":
        self._cuda = self.device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._thread = Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.card = max(self.card, torch.cuda.device_memory_used(self.device))

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._stop.set()
            self._thread.join()

    def gib(self) -> dict[str, float]:
        """Return the peaks in GiB; nothing without a card."""
        if not self._cuda:
            return {}
        own = torch.cuda.max_memory_allocated(self.device)
        return {"peak_torch_gib": own / 2**30, "peak_card_gib": self.card / 2**30}


def table(report: Report, folder: Path) -> None:
    """Time the stages on random blocks, and set them beside the limits of the machine."""
    options = report.options
    config = llama(options.hidden, options.blocks, options.length, options.vocabulary)
    work = BlockWork.of(config, options.samples, options.length)
    device, measured = run_on(options.device).start(), []

    def limits() -> dict[str, Any]:
        write_random(MODELS / BIG, config, families.tokenizer(), options.device)
        measured.append(measure(device, folder, work.bytes, options.side))
        return {"block_bytes": work.bytes, **_rounded(asdict(measured[0]))}

    report.case("table", "limits", limits)
    for name in options.rows if measured else []:
        report.case("table", name, partial(timed, options, name, work, measured[0]))


def timed(options: argparse.Namespace, name: str, work: BlockWork, limits: Limits) -> dict[str, Any]:
    """Make a row's artifact and return its times, limits, memory and energy."""
    row, run, count = ROWS[name], run_on(options.device), options.blocks
    reads = "tokens" in row.settings["calibration"]
    windows = {"num_samples": options.samples, "sequence_length": options.length}
    settings = row.settings | ({"group_size": options.group} if row.stage == "quantize" else {})
    artifact, device = f"{row.stage}/{name}", run.resolved_device()
    recipe = recipe_of(row.stage, row.method, settings, BIG, windows)
    gc.collect()  # what a row that failed has left
    torch.cuda.empty_cache()
    with block_times() as begun, Peak(device) as peak:
        meter, start = Meter(device), time.perf_counter()
        make(artifact, recipe, run)
        total, joules = time.perf_counter() - start, meter.joules()
    shutil.rmtree(MODELS / artifact)
    seconds, before = (begun[count - 1] - begun[0]) / (count - 1), begun[0] - start
    limit = work.seconds(limits, forward=reads, hessians=row.hessians)
    facts: dict[str, Any] = {
        "seconds_per_block": seconds, "start": before, "end": total - before - count * seconds,
        "limit": limit, "times_limit": seconds / limit, "disk": work.disk_seconds(limits),
    }  # fmt: skip
    if options.hidden == 4096 and any(card in options.card for card in ("H100", "H200")):
        facts["aim"] = max(row.aim, 1.2 * facts["disk"])
    if reads:
        facts["tokens_per_second"] = options.samples * options.length / seconds
    if joules is not None:
        facts["joules"] = joules
    return _rounded(facts | peak.gib())


def training(report: Report, folder: Path) -> None:
    """Time LoRA of a pruned random model, with the mask of its zeros and without."""
    options = report.options
    run, seconds = run_on(options.device), dict[str, float]()

    def pruned() -> dict[str, Any]:
        config = llama(options.hidden, options.blocks, options.length, options.vocabulary)
        write_random(MODELS / BIG, config, families.tokenizer(), options.device)
        make(HALF, METHODS["magnitude"].recipe("magnitude", BIG, {}), run)
        shutil.rmtree(MODELS / BIG)  # three models of 8B do not fit some disks
        write_text("long", project.text(3, documents=40 * options.length // 100), "lines")
        return {}

    def trained(keep: str) -> dict[str, Any]:
        data = {"dataset": "long", "num_samples": 16, "sequence_length": options.length, "held_out": 1}
        raw = ADAPTED | {"train": data, "keep": keep, "batch_size": options.batch}
        recipe, ends = methods("finetune")["lora"].model_validate(raw), list[float]()

        def timed_step(*args: Any) -> float:
            loss = take_step(*args)
            if run.resolved_device().type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            return loss

        gc.collect()
        torch.cuda.empty_cache()
        with mock.patch.object(loop, "take_step", timed_step), Peak(run.resolved_device()) as peak:
            make(f"finetune/{keep}", recipe, run)
        shutil.rmtree(MODELS / f"finetune/{keep}")
        seconds[keep] = statistics.median(later - earlier for earlier, later in pairwise(ends))
        facts = {"seconds_per_step": seconds[keep], **peak.gib()}
        facts["tokens_per_second"] = options.batch * options.length / seconds[keep]
        if len(seconds) == 2:
            facts["over_without_mask"] = seconds["mask"] / seconds["none"]
        return _rounded(facts)

    report.case("training", "prune", pruned)
    if (MODELS / HALF).exists():
        for keep in ("none", "mask"):
            report.case("training", f"lora, keep: {keep}", partial(trained, keep))


def _rounded(facts: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in facts.items()}


def show_table(report: Report) -> None:
    """Print the rows of the table in plain text."""
    columns = (
        "seconds_per_block", "limit", "times_limit", "disk", "aim", "start", "end", "peak_torch_gib",
        "peak_card_gib", "joules", "tokens_per_second",
    )  # fmt: skip
    rows = [line for line in report.lines if line["part"] == "table" and "seconds_per_block" in line]
    if rows:
        show(" ".join(["case".ljust(16), *(column.rjust(17) for column in columns)]))
    for row in rows:
        show(" ".join([row["case"].ljust(16), *(str(row.get(column, "")).rjust(17) for column in columns)]))


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="such as cuda:1; cpu tries the benchmark")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES)[:-1], metavar="PART")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seconds", type=float, default=285, help="time for all parts")
    parser.add_argument("--blocks", type=int, default=8, help="at least 2")
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=128256, help="of the model of the table")
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step of training")
    parser.add_argument("--memory", type=float, help="GiB of the card that torch may take; default: all")
    parser.add_argument("--side", type=int, default=8192, help="of the products that are measured")
    parser.add_argument(
        "--model", type=Path, default=Path("/tmp/model"), help="GGUF of SmolLM2, or its folder"
    )
    parser.add_argument("--folder", type=Path, help="where scratch files go")
    parser.add_argument("--json", type=Path, help="file for the lines as well")
    options = parser.parse_args()
    files = [options.model] if options.model.is_file() else sorted(options.model.glob("*.gguf"))
    options.model = files[0].resolve() if files else None
    options.group = 128 if options.hidden % 256 == 0 else 32
    device = torch.device(options.device)
    known = device.type == "cuda" and torch.cuda.is_available()
    options.card = torch.cuda.get_device_name(device) if known else device.type
    if options.blocks < 2 or options.hidden % 64:
        parser.error("--blocks is at least 2 and --hidden a multiple of 64.")
    if options.memory is not None and not known:
        parser.error("--memory limits a card; leave it out on the CPU.")
    return options


PARTS = {
    "parity": parity, "determinism": determinism, "resume": resume, "table": table, "training": training,
}  # fmt: skip


def main() -> None:
    """Parse the command line, do the parts and print the figures."""
    options = read_options()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        show("no GPU")
        return
    logging.disable(logging.WARNING)
    report = Report(options)
    if options.memory is not None:
        index = torch.device(options.device).index or 0
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * 2**30 / total), index)
    report.tell("device", options.card, memory=options.memory, torch=torch.__version__, cores=os.cpu_count())
    with tempfile.TemporaryDirectory(dir=options.folder) as name, chdir(name):
        write_random(MODELS / SMALL, llama(128, 3, 256), families.tokenizer())
        project.write_inputs(Path("inputs"))
        pipeline.download(pipeline.checked(project.params(Path("inputs"))), "datasets/news")
        for number, part in enumerate(options.only):
            report.give(SHARES[part] / sum(SHARES[other] for other in options.only[number:]))
            PARTS[part](report, Path(name))
    show_table(report)
    if options.json:
        options.json.write_text("".join(f"{json.dumps(line)}\n" for line in report.lines))
    raise SystemExit(report.exit_code())


if __name__ == "__main__":
    main()

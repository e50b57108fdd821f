"""A first params.yaml for a model of yours: small, commented, and sound as it is.

It compares the model with its noise, with two ways to 4 bits, with half its weights pruned and with a fifth
of its neurons removed, on a text and on a task. Everything that can be read off the checkpoint and the text
is: hashes, input widths, a group size that divides them, windows that fit the text and the model.
"""

import csv
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.layout import SECTIONS, check_replaceable, held_text, section_lines
from flows.probe import WIDTH_REMOVED, Probe, probe
from stages.core.errors import Refusal
from stages.core.files import sha256, write_text
from stages.core.reading import reading
from stages.core.schema import LONGEST_NAME
from stages.corpus.windows import cut_windows, distinct_rows, read_documents
from stages.job.checks.own_tasks import of_tasks
from stages.job.load import checked_params, parsed, read
from stages.job.params import Params
from stages.job.sentences import allowed
from stages.sources.documents import TABLE_SUFFIXES, LongDocument, split_documents
from stages.sources.text import Text

SCHEMA = Path("docs/params.schema.json")
"""The JSON Schema of params.yaml, for editors."""
SWEEPS = (Path("sweeps/graded.yaml"), Path("sweeps/benchmarks.yaml"))
"""The files with the tasks that `--task` may name."""
SAMPLE_TEXTS = Path("sweeps/methods.yaml")
"""The file with the two texts from packages that stand in where none is given."""
TASK = "arithmetic"
"""The task without `--task`: sums that code generates."""
_SAMPLES, _LENGTH, _WINDOWS, _SCORED = 64, 256, 12, 512
"""Calibration: windows and their tokens; perplexity: the same. A short text gets fewer and shorter ones."""
_NOTES = {
    ("", "run"): "device: auto, cpu, cuda, cuda:1; threads: of each stage, which run side by side",
    ("", "models"): "the model; in_features: the input widths of its linears, which group_size must divide",
    ("", "datasets"): "calibration: the share of a text that methods may read; the rest is for evaluation",
    ("", "prune"): "a recipe names its source and a method with its settings: docs/methods.md",
    ("", "teach"): "data sets that a model writes for others to learn from: docs/recovery.md",
    ("", "finetune"): "recovery of what compression cost: docs/recovery.md",
    ("", "noise"): "the same weights at another batch size: no difference below this one counts",
    ("", "floor"): "responders without knowledge, as candidates",
    ("", "suites"): "what is scored; a suite has the name of its data set",
    ("", "evaluate"): "the models that every suite scores",
    ("", "profile"): "models whose speed and memory are measured: docs/costs.md",
    ("", "report"): "margin: a loss that does not matter, two points of a share or 2 % of a perplexity",
    ("", "studies"): "published claims put to the test: docs/hypotheses.md",
}


def write_start(
    model: str, text: Path | None, task: str, output: Path, force: bool, draws: int = 1
) -> tuple[Params, bool]:
    """Write a params.yaml for a model; return what it says, and whether it replaced a file.

    Args:
        model: see `flows.probe.FORMS`.
        text: to calibrate on and to score; None for two texts from packages.
        task: a suite of `SWEEPS`, or the file of a task of lm-eval.
        output: the file to write.
        force: replace the file whatever it holds.
        draws: how often a recipe that reads text is made, each time on other windows, so that the report
            knows the noise of its method.

    Raises:
        Refusal: the file holds edits that git lacks; there is no such model, text or task; or they do not
            fit together. Nothing is written.
    """
    if not force:
        check_replaceable(output, "--output")
    before = held_text(output, "--output")
    name, kind, suite, dataset = task_entry(Path(task)) if Path(task).is_file() else (task, *_task(task))
    content, notes = _sections(probe(model), text, (kind, name, suite, dataset), draws)
    schema = os.path.relpath(SCHEMA, output.parent)
    lines = [
        f"# yaml-language-server: $schema={schema}",
        "# Written by `prunequant init`; yours to edit. `prunequant check` reports every mistake in it.",
    ]
    for section in SECTIONS:
        lines += ["", *section_lines(section, content.get(section, {}), notes)]
    written = "\n".join(lines) + "\n"
    params = checked_params(parsed(written), f"{output} as it would be", device=False)
    if mistakes := list(of_tasks(params)):
        raise Refusal("\n".join(mistakes))
    write_text(output, written)
    return params, bool(before)


def _sections(
    base: Probe, text: Path | None, asked: tuple[str, str, Any, Any], draws: int
) -> tuple[dict[str, Any], Mapping[tuple[str, str], str]]:
    """Return the sections of params.yaml and their comments."""
    kind, task, suite, dataset = asked
    name, notes = _slug(base.label, "model"), dict(_NOTES)
    scored = min(_SCORED, base.positions or _SCORED)
    length = min(_LENGTH, base.positions or _LENGTH)
    calibration = {"num_samples": _SAMPLES, "sequence_length": length}
    perplexity = {"windows": _WINDOWS, "sequence_length": scored, "batch_size": 4}
    if text is None:
        packaged = read(SAMPLE_TEXTS)["datasets"]
        texts = {key: packaged[key] for key in ("news", "speeches")}
        notes["datasets", "speeches"] = "a text unlike the one that methods read"
        suites = {key: dict(perplexity) for key in texts}
    else:
        own = _slug(text.stem, "text", taken=task)
        texts = {own: _text(text)}
        calibration, perplexity = _windows(Text.model_validate(texts[own]), base, calibration, perplexity)
        suites = {own: perplexity}
    reads = {"dataset": next(iter(texts)), **calibration}
    common: dict[str, Any] = {"source": f"base/{name}", **({"ignore": base.ignore} if base.ignore else {})}
    bits = {"bits": 4, "group_size": base.group_size}
    suffix = f"g{base.group_size}" if base.group_size else ""
    prune: dict[str, Any] = {"wanda-50": {**common, "method": "wanda", "sparsity": 0.5, "calibration": reads}}
    if base.no_width is None:
        prune[f"width-{WIDTH_REMOVED * 100:.0f}"] = {
            "source": f"base/{name}", "method": "width", "importance": "ppm", "remove": WIDTH_REMOVED,
            "calibration": {"dataset": "none"},
        }  # fmt: skip
    else:
        notes["", "prune"] += f"\nno width pruning: {' '.join(base.no_width.split())}"
    quantize = {
        f"rtn-w4{suffix}": {**common, "method": "rtn", **bits, "calibration": {"dataset": "none"}},
        f"gptq-w4{suffix}": {**common, "method": "gptq", **bits, "calibration": reads},
    }
    from flows.exporting.ggml_types import PER_SCALE  # imports torch, as the probe has by now

    if base.group_size is None:
        notes["", "quantize"] = (
            "no group of 8 to 128 columns fits every width, so each row has one scale; GGUF cannot hold that"
        )
    elif base.group_size % PER_SCALE:
        notes["", "quantize"] = (
            f"groups of {base.group_size} are the longest that fit every width; GGUF cannot hold them, as "
            f"its blocks have {PER_SCALE} columns"
        )
    if base.chats and kind in ("graded", "benchmark"):
        suite = {**suite, "chat_template": True}
        notes[f"suites.{kind}", task] = "the checkpoint has a chat template; without it set false"
    others = {perplexity["batch_size"], suite.get("batch_size")}
    noisy = next(size for size in (5, 3, 2) if size not in others)
    noise = f"batch-{noisy}"
    repeats = {**_draw_again("prune", prune, draws), **_draw_again("quantize", quantize, draws)}
    recipes = {"noise": [noise], "prune": prune, "quantize": quantize}
    return {
        "run": {"device": "auto", "dtype": "bfloat16", "threads": 1, "seed": 0, "numerics": "fast"},
        "models": {name: base.settings},
        "datasets": {**texts, task: dataset},
        "prune": prune,
        "quantize": quantize,
        "noise": {noise: {"source": f"base/{name}", "batch_size": noisy}},
        "suites": {"perplexity": suites, kind: {task: suite}},
        "evaluate": {
            "candidates": [f"base/{name}", *(f"{stage}/{key}" for stage in recipes for key in recipes[stage])]
        },
        "profile": {"candidates": []},
        "report": {"margin": 0.02, **({"noise": repeats} if repeats else {})},
    }, notes


def _draw_again(stage: str, recipes: dict[str, Any], draws: int) -> dict[str, list[str]]:
    """Add further draws of each recipe that reads text; return which belong together, for `report.noise`."""
    repeats: dict[str, list[str]] = {}
    for name, recipe in list(recipes.items()):
        if recipe["calibration"]["dataset"] == "none" or draws == 1:
            continue
        others = {
            f"{name}-draw-{seed}": recipe | {"calibration": recipe["calibration"] | {"seed": seed}}
            for seed in range(1, draws)
        }
        recipes.update(others)
        repeats[name] = [f"{stage}/{each}" for each in (name, *others)]
    return repeats


def _slug(label: str, otherwise: str, taken: str = "") -> str:
    """Return a legal name close to `label`."""
    slug = "-".join(re.findall("[a-z0-9]+", label.lower()))[:LONGEST_NAME].strip("-")
    return slug if slug not in ("", "none", taken) else otherwise


def _task(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the kind, the suite and the data set of a task.

    Raises:
        Refusal: there is no such task.
    """
    known: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    for file in SWEEPS:
        sweep = read(file)
        for kind, suites in sweep["suites"].items():
            known |= {key: (kind, suite, sweep["datasets"][key]) for key, suite in suites.items()}
    if name not in known:
        raise Refusal(f"there is no task {name!r}; {allowed(known, name)}.")
    return known[name]


def task_entry(file: Path) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Return the name, kind, suite and data set of a task of lm-eval, a YAML file with its data beside it.

    Raises:
        Refusal: the file is no YAML by its name.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise Refusal(f"{file} is no task; give the YAML of a task of lm-eval, which names its data files.")
    if Path.cwd().is_relative_to(file.parent.resolve()):
        raise Refusal(
            f"{file} lies in the project's own folder, all of which would be hashed as its data; put the "
            "YAML and its data files into a folder of their own."
        )
    dataset = {
        "kind": "task",
        "source": f"path:{file.parent}",
        "yaml": file.name,
        "sha256": sha256(file.parent),
    }
    return _slug(file.stem, "task"), "benchmark", {"task": f"path:{file}", "batch_size": 8}, dataset


def _text(path: Path) -> dict[str, Any]:
    """Return the data set of a text file or of a folder of them, as an entry of `datasets`.

    Raises:
        Refusal: there is no such file, or its table has no column of text.
    """
    if not path.exists():
        raise Refusal(f"there is no text {path}; give a file, or a folder of files.")
    where = (
        {"source": f"path:{path}"} if path.is_dir() else {"source": f"path:{path.parent}", "file": path.name}
    )
    how = "files" if path.is_dir() else TABLE_SUFFIXES.get(path.suffix.lower()) or _of_plain(path)
    column = _column(path, how) if how in TABLE_SUFFIXES.values() else "text"
    return {
        "kind": "text", **where, "sha256": sha256(path), "documents": how,
        **({} if column == "text" else {"column": column}), "calibration": 0.5,
    }  # fmt: skip


def _of_plain(path: Path) -> str:
    """Tell whether a text is cut at blank lines or, if that leaves most of it in one piece, at every line."""
    with reading(str(path)):
        content = path.read_bytes()
    first, *others = split_documents(content, "paragraphs", str(path)) or [""]
    return "paragraphs" if len(first) < sum(map(len, others)) else "lines"


def _column(path: Path, how: str) -> str:
    """Return the column of a table that holds text: `text` if there is one, else the longest.

    Raises:
        Refusal: it cannot be read, or no column holds text.
    """
    with reading(str(path)):
        if how == "parquet":
            from pyarrow import parquet

            row = next(iter(parquet.ParquetFile(path).iter_batches(batch_size=100))).to_pylist()
        elif how == "jsonl":
            with path.open(encoding="utf-8-sig") as file:
                row = [json.loads(line) for line, _ in zip(file, range(100), strict=False) if line.strip()]
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                row = [line for line, _ in zip(csv.DictReader(file), range(100), strict=False)]
        lengths: dict[str, int] = {}
        for entry in row:
            for key, value in entry.items():
                if isinstance(value, str):
                    lengths[key] = lengths.get(key, 0) + len(value)
    if not lengths:
        raise Refusal(f"{path} has no column of text; write a text in each row.")
    return "text" if "text" in lengths else max(lengths, key=lambda key: lengths[key])


def _windows(
    text: Text, base: Probe, calibration: dict[str, int], perplexity: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the numbers and lengths of windows that a text has enough tokens for.

    Raises:
        Refusal: it cannot be cut into documents, or is too short.
    """
    with tempfile.TemporaryDirectory(prefix="prunequant-") as folder:
        try:
            text.write(Path(folder))
        except LongDocument:
            raise Refusal(
                f"{text.source} {text.file}: its first document has more than half of its characters, and "
                "half of a text is kept for calibration; give one with more lines, paragraphs or rows."
            ) from None
        parts = [read_documents("", split, Path(folder)) for split in ("calibration", "evaluation")]
    fitted = []
    for part, wanted, count, least in (
        (parts[0], calibration, "num_samples", 4), (parts[1], perplexity, "windows", 2)
    ):  # fmt: skip
        length = wanted["sequence_length"]
        while (there := _distinct(base, part, length)) < wanted[count] and length > 64:
            length //= 2
        if there < least:
            raise Refusal(
                f"{text.source} {text.file} is too short: half of it has {there} windows of {length} tokens, "
                f"and {least} are needed; give a longer text."
            )
        fitted.append({**wanted, "sequence_length": length, count: min(wanted[count], there)})
    return fitted[0], fitted[1]


def _distinct(base: Probe, documents: list[str], length: int) -> int:
    """Count the distinct windows of `length` tokens."""
    return len(distinct_rows(cut_windows(base.tokenizer, documents, length)))

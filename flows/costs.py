"""The cost of an evaluation: how much each suite asks, how long it took, and which batch size is fast."""

import logging
import statistics
import time
from typing import Any, NamedTuple

from rich.table import Table

from stages.core.errors import Refusal
from stages.core.files import read_json, run_record
from stages.core.lazy import torch
from stages.job import lineage
from stages.job.params import Params
from stages.model.artifact import load_model, load_record, load_tokenizer
from stages.profiling.speed import PeakMemory

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_NEAR = 1.05
"""Up to this many times the shortest time counts as fast: a smaller batch takes less memory."""


def costs(params: Params, candidate: str) -> list[dict[str, Any]]:
    """Return a row a suite: items, requests, tokens, and the minutes of its last run.

    Raises:
        Refusal: the candidate is unknown, or its tokenizer or a suite's data set does not exist yet.
    """
    from stages.evaluation.null import ANSWER_TOKENS
    from stages.evaluation.requests import calls, cost

    suites = params.suites.by_name()
    _check(params, candidate, list(suites))
    tokenizer = load_tokenizer(candidate)
    rows = []
    for name, suite in suites.items():
        requests = calls(suite, name, tokenizer, params.run.seed)
        amounts = cost(requests, tokenizer, ANSWER_TOKENS, getattr(suite, "thinking", None))
        rows.append({"suite": name, **amounts._asdict(), "minutes": _minutes(candidate, name)})
    return rows


def _minutes(candidate: str, suite: str) -> float | None:
    """Return the minutes of the last evaluation; None if it failed or never ran."""
    file = run_record("evaluate", f"{candidate}/{suite}")
    record: dict[str, Any] = read_json(file) if file.exists() else {"state": "never"}
    return record["seconds"] / 60 if record["state"] == "done" else None


class Trial(NamedTuple):
    """A batch size, the seconds that it took for the suite's first items, and its peak memory in bytes."""

    batch_size: int
    seconds: float
    peak_bytes: int | None


def trials(params: Params, candidate: str, suite: str, items: int, repeats: int = 3) -> list[Trial]:
    """Time the first `items` requests of each call of `suite` at every batch size that they fill.

    Each time is the median of `repeats` turns after a warm-up. A suite with thinking thinks once an item,
    at its largest budget.

    Raises:
        Refusal: the candidate or the suite is unknown or does not exist yet, or the candidate is not a model.
    """
    from stages.evaluation.requests import calls
    from stages.evaluation.shared import SharedPrefixLM
    from stages.evaluation.thinking.budget import BudgetLM

    _check(params, candidate, [suite])
    if "responder" in load_record(candidate):
        raise Refusal(f"{candidate} has no model and is as fast at any batch size; name a model.")
    settings = params.suites.by_name()[suite]
    if settings.backend == "vllm":
        raise Refusal(f"{suite} is answered by vLLM, which forms batches itself; leave batch_size out there.")
    thinking = getattr(settings, "thinking", None)
    device = params.run.start()
    tokenizer = load_tokenizer(candidate)
    shortened = [
        (method, requests[:items]) for method, requests in calls(settings, suite, tokenizer, params.run.seed)
    ]
    model = load_model(candidate, params.run, dequantize=False)
    options: dict[str, Any] = {
        "pretrained": model, "tokenizer": tokenizer, "device": str(device), "softmax_dtype": "float32",
    }  # fmt: skip

    def batched(size: int) -> SharedPrefixLM:
        if thinking:
            return BudgetLM(thinking, params.run.seed, batch_size=size, **options)
        return SharedPrefixLM(batch_size=size, **options)

    results = []
    most = max(len(requests) for _, requests in shortened)
    for size in [size for size in _BATCH_SIZES if size <= most]:
        peak, seconds = PeakMemory(device), []
        for _ in range(repeats + 1):
            lm = batched(size)  # a new one each turn, as it keeps its thoughts
            torch.manual_seed(params.run.seed)
            start = time.perf_counter()
            for method, requests in shortened:
                getattr(lm, method)(requests, disable_tqdm=True)
            seconds.append(time.perf_counter() - start)
        results.append(Trial(size, statistics.median(seconds[1:]), peak.bytes()))
    return results


def proposed(results: list[Trial]) -> Trial:
    """Return the smallest batch size that is about as fast as the fastest."""
    fastest = min(trial.seconds for trial in results)
    return min(trial for trial in results if trial.seconds <= _NEAR * fastest)


def cost_table(rows: list[dict[str, Any]]) -> Table:
    """Return costs ready to print."""
    table = Table("suite")
    for column in ("items", "requests", "tokens read", "tokens written, at most", "minutes, last run"):
        table.add_column(column, justify="right")
    for row in rows:
        minutes = "not run yet" if row["minutes"] is None else f"{row['minutes']:.1f}"
        amounts = (f"{row[key]:,}" for key in ("items", "requests", "read", "written"))
        table.add_row(row["suite"], *amounts, minutes)
    return table


def trial_table(results: list[Trial]) -> Table:
    """Return trials ready to print, with the proposed batch size marked."""
    table = Table("batch size")
    for column in ("seconds", "peak MB", ""):
        table.add_column(column, justify="right")
    best = proposed(results)
    for trial in results:
        memory = "not measured" if trial.peak_bytes is None else f"{trial.peak_bytes / 1e6:.0f}"
        table.add_row(
            str(trial.batch_size), f"{trial.seconds:.2f}", memory, "proposed" if trial == best else ""
        )
    return table


def _check(params: Params, candidate: str, suites: list[str]) -> None:
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # lm-eval warns a lot about a responder without a model
    known = ["base/" + name for name in params.models] + list(params.recipes())
    if candidate not in known:
        raise Refusal(f"there is no {candidate!r}; params.yaml has {', '.join(known)}.")
    defined = params.suites.by_name()
    if unknown := [suite for suite in suites if suite not in defined]:
        raise Refusal(f"there is no suite {unknown[0]!r}; params.yaml has {', '.join(defined)}.")
    if missing := lineage.missing_inputs(params, [candidate], suites):
        raise Refusal("; ".join(missing) + ".")

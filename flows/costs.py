"""What an evaluation costs: what each suite asks, how long it took, and which batch size is fast."""

import json
import logging
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from stages.core.errors import Refusal
from stages.core.files import RUNS
from stages.job import lineage

if TYPE_CHECKING:
    from stages.job.params import Params

SIZES = (1, 2, 4, 8, 16, 32, 64)
NEAR = 1.05
"""Times the shortest time that is as good: a smaller batch takes less memory."""


def costs(params: "Params", candidate: str) -> list[dict[str, Any]]:
    """One row a suite: items, requests, tokens, and the minutes its last run took.

    Raises:
        Refusal: something is not there that the suites are made from.
    """
    from stages.evaluation.null import LONGEST
    from stages.evaluation.requests import calls, cost
    from stages.model.artifact import load_tokenizer

    _check(params, candidate, list(params.suites.by_name()))
    tokenizer = load_tokenizer(candidate)
    rows = []
    for suite in params.suites.by_name():
        thinking = getattr(params.suites.by_name()[suite], "thinking", None)
        amounts = cost(
            calls(params.suites.by_name()[suite], suite, tokenizer, params.run.seed),
            tokenizer,
            LONGEST,
            thinking,
        )
        record = RUNS / "evaluate" / candidate / f"{suite}.json"
        ran: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"state": "never"}
        minutes = ran["seconds"] / 60 if ran["state"] == "done" else None
        rows.append({"suite": suite, **amounts._asdict(), "minutes": minutes})
    return rows


class Trial(NamedTuple):
    """One batch size: the seconds that the suite's first items took, and the memory beside it, in bytes."""

    batch_size: int
    seconds: float
    peak_bytes: int | None


def trials(params: "Params", candidate: str, suite: str, items: int, repeats: int = 3) -> list[Trial]:
    """Time the first `items` requests of each call of `suite` at every batch size that they fill.

    The median of `repeats` turns, after one that is not counted. A suite that thinks does so once an item,
    at its largest budget.

    Raises:
        Refusal: the candidate or the suite is not there, or the candidate is no model.
    """
    import torch

    from stages.evaluation.requests import calls
    from stages.evaluation.shared import SharedPrefixLM
    from stages.evaluation.thinking.budget import BudgetLM
    from stages.model.artifact import load_model, load_record, load_tokenizer
    from stages.profiling.speed import Peak

    _check(params, candidate, [suite])
    if "responder" in load_record(candidate):
        raise Refusal(f"{candidate} has no model, and answers as fast at any batch size; name a model.")
    thinking = getattr(params.suites.by_name()[suite], "thinking", None)
    device = params.run.start()
    tokenizer = load_tokenizer(candidate)
    asked = [
        (method, requests[:items])
        for method, requests in calls(params.suites.by_name()[suite], suite, tokenizer, params.run.seed)
    ]
    model = load_model(candidate, params.run, dequantize=False)
    options: dict[str, Any] = {
        "pretrained": model, "tokenizer": tokenizer, "device": str(device), "softmax_dtype": "float32",
    }  # fmt: skip

    def asked_in(size: int) -> SharedPrefixLM:
        if thinking:
            return BudgetLM(thinking, params.run.seed, batch_size=size, **options)
        return SharedPrefixLM(batch_size=size, **options)

    found = []
    most = max(len(requests) for _, requests in asked)
    for size in [size for size in SIZES if size <= most]:
        peak, seconds = Peak(device), []
        for _ in range(repeats + 1):
            lm = asked_in(size)  # a new one, as it keeps what it has thought
            torch.manual_seed(params.run.seed)
            start = time.perf_counter()
            for method, requests in asked:
                getattr(lm, method)(requests, disable_tqdm=True)
            seconds.append(time.perf_counter() - start)
        found.append(Trial(size, statistics.median(seconds[1:]), peak.bytes()))
    return found


def proposed(found: list[Trial]) -> Trial:
    """The smallest batch of those that are about as fast as the fastest."""
    fastest = min(trial.seconds for trial in found)
    return min(trial for trial in found if trial.seconds <= NEAR * fastest)


def cost_table(rows: list[dict[str, Any]]) -> Table:
    """Ready to print."""
    table = Table("suite")
    for column in ("items", "requests", "tokens read", "tokens written, at most", "minutes, last run"):
        table.add_column(column, justify="right")
    for row in rows:
        minutes = "not run yet" if row["minutes"] is None else f"{row['minutes']:.1f}"
        amounts = (f"{row[key]:,}" for key in ("items", "requests", "read", "written"))
        table.add_row(row["suite"], *amounts, minutes)
    return table


def trial_table(found: list[Trial]) -> Table:
    """Ready to print, the proposed one marked."""
    table = Table("batch size")
    for column in ("seconds", "peak MB", ""):
        table.add_column(column, justify="right")
    best = proposed(found)
    for trial in found:
        memory = "not measured" if trial.peak_bytes is None else f"{trial.peak_bytes / 1e6:.0f}"
        table.add_row(
            str(trial.batch_size), f"{trial.seconds:.2f}", memory, "proposed" if trial == best else ""
        )
    return table


def _check(params: "Params", candidate: str, suites: list[str]) -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a model that knows nothing is warned of much
    known = ["base/" + name for name in params.models] + list(params.recipes())
    if candidate not in known:
        raise Refusal(f"there is no {candidate!r}; params.yaml has {', '.join(known)}.")
    if unknown := [suite for suite in suites if suite not in params.suites.by_name()]:
        raise Refusal(
            f"there is no suite {unknown[0]!r}; params.yaml has {', '.join(params.suites.by_name())}."
        )
    if missing := lineage.unmade(params, [candidate], suites):
        raise Refusal("; ".join(missing) + ".")

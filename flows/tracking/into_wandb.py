"""Runs of Weights & Biases: scores in the summary, params and the hashes of artifacts in the config.

A run's id is its entry's key, so logging it again updates the run. What wandb adds by itself is switched off:
host, user, command, git remote, code, versions, console and the machine's load.
"""

import os
from collections.abc import Sequence

import wandb

from flows.tracking.logged import Entry, redacted
from stages.core.errors import Refusal
from stages.core.files import RUNS


def write_to_wandb(logged: Sequence[Entry], project: str) -> list[str]:
    """Write entries into a project, with WANDB_MODE=offline into data/runs/wandb; a sentence for each.

    Raises:
        Refusal: wandb fails, for example as nobody is logged in, or is switched off.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        raise Refusal("WANDB_MODE is disabled, so nothing is logged; unset it, or set it to offline.")
    try:
        return [_write(entry, project) for entry in logged]
    except wandb.Error as error:
        raise Refusal(
            f"wandb failed: {redacted(str(error).splitlines()[0])}; run `wandb login`, or set "
            "WANDB_MODE=offline and `wandb sync` later."
        ) from None
    finally:
        wandb.teardown()  # its service has written all before it ends


def _write(entry: Entry, project: str) -> str:
    RUNS.mkdir(parents=True, exist_ok=True)
    if os.environ.get("WANDB_MODE") == "offline":
        kept = sorted(RUNS.glob(f"wandb/offline-run-*-{entry.key}"))
        if kept:
            return f"{entry.candidate}: these results are in {kept[0]} already."
    settings = wandb.Settings(
        console="off", disable_code=True, disable_git=True, disable_job_creation=True, silent=True,
        x_disable_meta=True, x_disable_stats=True, x_save_requirements=False,
    )  # fmt: skip
    with wandb.init(
        project=project, id=entry.key, name=entry.candidate, resume="allow", dir=RUNS, settings=settings
    ) as run:
        config = {**entry.params, "md5": entry.artifacts, "candidate": entry.candidate}
        run.config.update(config, allow_val_change=True)
        run.summary.update(entry.scores)
    return f"{entry.candidate}: {len(entry.scores)} scores are run {entry.key}."

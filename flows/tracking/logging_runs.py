"""`prunequant log`: write the candidates of a revision to a tracker, each as a run of its own."""

from collections.abc import Sequence

from flows.changes.revisions import read_revision
from flows.tracking import Tracker
from flows.tracking.logged import entries
from stages.core.errors import Refusal


def log_candidates(
    tracker: Tracker, candidates: Sequence[str], at: str | None, project: str, fetched: bool = False
) -> list[str]:
    """Write candidates to a tracker; return a sentence for each.

    Args:
        candidates: empty: all that are evaluated.
        at: their revision; None: the workspace.
        project: the tracker's name for a group of runs: an experiment of MLflow, a project of wandb.
        fetched: whether to bring results that the cache lacks from the default DVC remote.

    Raises:
        Refusal: the tracker's library is not installed, there is nothing to log, or the tracker fails.
    """
    try:
        if tracker is Tracker.mlflow:
            from flows.tracking.into_mlflow import write_to_mlflow as write
        else:
            from flows.tracking.into_wandb import write_to_wandb as write
    except ModuleNotFoundError as error:
        if error.name != tracker.value:
            raise
        extra = f"'.[{tracker.value}]'"
        raise Refusal(f"{tracker.value} is not installed; install it here: pip install -e {extra}") from None
    return write(entries(read_revision(at), candidates, fetched), project)

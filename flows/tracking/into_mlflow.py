"""Runs of MLflow: scores as metrics, params, and the hashes of artifacts as tags.

A run is found again by its entry's key. A finished one is left as it is; one that was cut off is completed.
"""

import os
import re
import time
from collections.abc import Sequence

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import, which reads it

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from flows.tracking.logged import Entry, redacted
from stages.core.errors import Refusal

_ADDRESS = "MLFLOW_TRACKING_URI"
_KEY = "prunequant.key"
_PIECE = 90
"""Entries of a request; MLflow takes 100 params and tags."""
_UNNAMEABLE = re.compile(r"[^\w\-. :/]")


def write_to_mlflow(logged: Sequence[Entry], project: str) -> list[str]:
    """Write entries into an experiment; return a sentence for each.

    Raises:
        Refusal: no tracking server or store is named, or it fails.
    """
    if not os.environ.get(_ADDRESS):
        raise Refusal(
            f"{_ADDRESS} is not set; set it to a server, or to a local store outside the project, such as "
            "sqlite:////home/me/mlflow.db"
        )
    try:
        client = MlflowClient()
        experiment = client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else client.create_experiment(project)
        return [_write(client, place, entry) for entry in logged]
    except MlflowException as error:
        reason = redacted(str(error).splitlines()[0])
        raise Refusal(f"MLflow failed: {reason}") from None


def _write(client: MlflowClient, experiment: str, entry: Entry) -> str:
    runs = client.search_runs([experiment], f"tags.`{_KEY}` = '{entry.key}'")
    if runs and runs[0].info.status == "FINISHED":
        return f"{entry.candidate}: these results are run {runs[0].info.run_id} already."
    tags = {_KEY: entry.key, "prunequant.candidate": entry.candidate}
    run = runs[0] if runs else client.create_run(experiment, tags=tags, run_name=entry.candidate)
    name, now = run.info.run_id, int(time.time() * 1000)
    metrics = [Metric(_named(key), score, now, 0) for key, score in entry.scores.items()]
    params = [Param(_named(key), text) for key, text in entry.params.items()]
    hashes = [RunTag(_named(f"md5.{path}"), md5) for path, md5 in entry.artifacts.items()]
    for at in range(0, max(map(len, (metrics, params, hashes))), _PIECE):
        part = slice(at, at + _PIECE)
        client.log_batch(name, metrics[part], params[part], hashes[part])
    client.set_terminated(name)
    return f"{entry.candidate}: {len(metrics)} metrics are run {name}."


def _named(key: str) -> str:
    """Return a name that MLflow takes."""
    return _UNNAMEABLE.sub("_", key)

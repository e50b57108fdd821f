"""The command line: `prunequant run`, `check`, `diff`, `cost`, `batch-size`, `profile`.

A mistake that the user can mend is one message and exit code 2, never a traceback; a stage that fails is exit
code 1. Heavy imports are inside the commands, so that `check` answers without starting Prefect.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from stages.core.errors import Refusal

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@contextmanager
def refusals() -> Iterator[None]:
    """Print a refusal as it is and exit with 2."""
    try:
        yield
    except Refusal as refusal:
        typer.echo(str(refusal), err=True)
        raise typer.Exit(2) from None


@app.command()
def check() -> None:
    """Check params.yaml as a whole; runs nothing."""
    with refusals():
        from stages.job.entry import outdated
        from stages.job.load import load_verified

        params = load_verified()
    typer.echo(
        f"params.yaml is sound: {len(params.models)} model(s), {len(params.recipes())} recipe(s), "
        f"{len(params.evaluate.candidates)} candidate(s) on {len(params.suites.by_name())} suite(s)."
    )
    if names := outdated():
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        typer.echo(
            f"data/code does not know the code of {', '.join(names[:6])}{more}: `dvc status` and `dvc repro "
            "--dry` cannot show what is stale until `dvc repro code` has run; `prunequant run` does so first."
        )


@app.command()
def run(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages or artifacts, such as prune/wanda-50; default all.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Stages side by side; default cores / run.threads, 1 on a GPU."),
    ] = None,
) -> None:
    """Bring everything, or the targets and what they need, up to date."""
    with refusals():
        from flows import graph
        from stages.job.load import load

        load()  # report a mistake before a server is started
        graph.select(graph.read_graph(), targets or [])
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the flow prints for itself
    signal.signal(signal.SIGTERM, _terminated)
    from flows.compare import compare, start_server

    try:
        start_server()
        state = compare(jobs=jobs, targets=targets or [], return_state=True)
    except KeyboardInterrupt:
        typer.echo("interrupted; finished stages are kept, run again to continue.", err=True)
        raise typer.Exit(130) from None
    if not state.is_completed():
        typer.echo(state.message, err=True)
        raise typer.Exit(1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="The older revision: a commit, branch, tag or DVC experiment.")],
    b: Annotated[str | None, typer.Argument(help="The newer one; default the workspace.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what changed from A to B: params, artifacts, scores beside their noise, and flipped items."""
    with refusals():
        from flows.diff import diff as compare_revisions

        changes = compare_revisions(a, b)
    if as_json:
        typer.echo(json.dumps(changes, indent=2))
    else:
        from flows.show import show
        from flows.terminal import console

        show(changes, console)


@app.command()
def cost(
    candidate: Annotated[str, typer.Argument(help="A model, such as base/smollm2.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what each suite asks of a model: items, tokens, and how long the last run took."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    with refusals():
        from flows import costs
        from stages.job.load import load

        rows = costs.costs(load(), candidate)
    _print(rows, as_json, costs.cost_table)


@app.command(name="batch-size")
def batch_size(
    candidate: Annotated[str, typer.Argument(help="A model, such as base/smollm2.")],
    suite: Annotated[str, typer.Argument(help="A suite of params.yaml.")],
    items: Annotated[int, typer.Option(min=1, help="Requests to try it on, of each kind.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Propose a batch size: the smallest that is about as fast as the fastest, for a model and a suite.

    Use the same for all candidates of a suite, as in bfloat16 the batch size changes answers.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    with refusals():
        from flows import costs
        from stages.job.load import load

        trials = costs.trials(load(), candidate, suite, items)
    _print([trial._asdict() for trial in trials] if as_json else trials, as_json, costs.trial_table)


@app.command()
def profile(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the speed, memory and energy that `prunequant run profile` has measured."""
    with refusals():
        from flows import profiles

        measured = profiles.read_profiles()
    _print(measured, as_json, profiles.profile_table)


def _print(values: Any, as_json: bool, table: Callable[[Any], Any]) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        from flows.terminal import console

        console.print(table(values))


def _terminated(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    app()

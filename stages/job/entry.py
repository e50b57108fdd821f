"""The command line of every stage: `python -m stages.<stage> <recipe>`.

Params are checked as a whole, the recipe's inputs and the identity of its code as well, then the stage
function gets its own pieces. A refusal is printed without a traceback and ends the process with exit code 2,
Ctrl-C with 130.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from stages.core import disk, identity, portable
from stages.core.errors import Refusal
from stages.core.files import CODE, DATASETS, MODELS, checking
from stages.job import lineage, provenance
from stages.job.load import PARAMS, checked_params, read
from stages.job.locked import locked_stages
from stages.job.params import Params
from stages.job.pieces import STAGES, Pieces, dvc_name, identified, method_of
from stages.job.record import recorded

CHATTY = ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "lm_eval")
"""Libraries that log what no user needs."""


def entry(work: Callable[..., None]) -> None:
    """Run a stage function for the recipe that the command line names.

    Args:
        work: the stage function, named like its stage; it raises `Refusal` for what the user can mend.
    """
    stage = work.__name__
    pieces = STAGES[stage]
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}", description=work.__doc__)
    if pieces.recipes is not None:
        parser.add_argument("recipe", help="a name from params.yaml, or DVC's, such as prune@wanda-50")
    # Without a handler SIGTERM ends Python on the spot: half-written files stay, and no record is written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    name = getattr(parser.parse_args(), "recipe", "all")
    sound = False
    try:
        whole_params = provenance.content(PARAMS)
        raw = read()
        params = checked_params(raw, device=False)  # a stage that computes asks for it itself
        name = _recipe_of(stage, params, name)
        _log_as(f"{stage} {name}: ")
        _check_name(pieces, params, name)
        if params.run.numerics == "portable" and "run.numerics" in pieces.keys(params, name):
            portable.hold_kernels()
        sound = True
        planned = provenance.inputs(stage, name, raw, params, whole_params)
        _check_inputs(planned, params)
        with recorded(stage, name), checking(planned.check):
            work(*pieces.arguments(params, name))
            planned.check()
            planned.write()
    except KeyboardInterrupt:
        print(f"{stage} {name}: interrupted; run it again to continue.", file=sys.stderr)  # noqa: T201
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        lost = provenance.removed(stage, name)
        when = "" if sound else ", once params.yaml is sound and has this recipe"
        cure = f" Its last result is in DVC's cache: `dvc checkout {' '.join(lost)}`{when}." if lost else ""
        print(f"{stage} {name}: {_sentence(error)}{cure}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def _recipe_of(stage: str, params: Params, name: str) -> str:
    """Return the recipe of a stage that is named as DVC names it; other names as they are.

    dvc.yaml passes DVC's name in a variable, so that no name from params.yaml is ever a part of a command.
    """
    recipes = STAGES[stage].recipes
    known = {} if recipes is None else {dvc_name(stage, params, recipe): recipe for recipe in recipes(params)}
    return known.get(name.rpartition(":")[2], name)


def _check_name(pieces: Pieces, params: Params, name: str) -> None:
    """Refuse a recipe that params.yaml does not have."""
    if pieces.recipes is not None and name not in (known := pieces.recipes(params)):
        raise Refusal(f"there is no recipe of this name; params.yaml has {', '.join(known) or 'none'}.")


def _check_inputs(planned: provenance.Inputs, params: Params) -> None:
    """Refuse inputs that are missing or not what dvc.lock says, and code that `data/code` does not know."""
    pieces, name = STAGES[planned.stage], planned.name
    if missing := lineage.missing_inputs(params, pieces.models(params, name), pieces.datasets(params, name)):
        raise Refusal(f"nothing was run, for {'; '.join(missing)}.")
    check_provenance(pieces, params, name)
    if planned.stage != "code":
        method, _ = method_of(planned.stage, params, name)
        check_identity(CODE / planned.stage / method, planned.code)


def check_provenance(pieces: Pieces, params: Params, name: str) -> None:
    """Refuse inputs that were computed from other things than dvc.lock says.

    Raises:
        Refusal: names each of them and the command that computes it again.
    """
    wanted = [str(MODELS / model) for model in pieces.models(params, name)]
    wanted += [str(DATASETS / dataset) for dataset in pieces.datasets(params, name)]
    if pieces is STAGES["report"]:
        wanted += map(str, provenance.reported(params))
    if wrong := provenance.disagreements(locked_stages(wanted), wanted):
        causes = "; ".join(f"{stage}: {inputs}" for stage, inputs in wrong.items())
        raise Refusal(
            f"dvc.lock names other inputs than these results were computed from ({causes}), as something was "
            f"edited while DVC saved them; `prunequant run` computes them again."
        )


def check_identity(record: Path, now: str) -> None:
    """Refuse to run other code than `data/code/<stage>/<method>` records, as the recipe depends on that file.

    Args:
        now: the identity of the code that would run.

    Raises:
        Refusal: the record is missing, or names other code.
    """
    cure = "run `dvc repro code`, or `prunequant run`, which does so first"
    if not record.exists():
        raise Refusal(f"{record}, the identity of this code, does not exist; {cure}.")
    then = record.read_text()
    if now != then:
        changed = sorted({line.split("  ")[1] for line in {*now.splitlines()} ^ {*then.splitlines()}})
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise Refusal(f"{', '.join(changed[:4])}{more} changed since {record} was written; {cure}.")


def outdated() -> list[str]:
    """Return every `<stage>/<method>` whose record in `data/code` is missing or of other code."""
    names = []
    for stage, method, module in identified():
        record = CODE / stage / method
        if not record.exists() or record.read_text() != identity.text(identity.of(stage, module)):
            names.append(f"{stage}/{method}")
    return names


def _sentence(error: Exception) -> str:
    """Say what went wrong and how to mend it; an error that nobody foresaw is raised again."""
    if isinstance(error, Refusal):
        return str(error)
    if disk.is_full(error):
        return disk.full()
    raise error


class _Speaking(logging.Formatter):
    """Begins the lines of the project's own loggers with a prefix, which tells a flow that they are ours."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return self._prefix + line if record.name.startswith("stages.") else line


def _log_as(prefix: str) -> None:
    """Log to the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Speaking(prefix))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

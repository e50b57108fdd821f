"""Reading params.yaml: every mistake in it is one line of a single refusal, before any work."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from ruamel.yaml import YAML  # what DVC reads the file with; other parsers see other numbers in it
from ruamel.yaml.error import YAMLError

from stages.core.errors import Refusal
from stages.job import checks
from stages.job.checks import entries, hashes
from stages.job.params import Params
from stages.job.sentences import follows, sentence

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PARAMS = Path("params.yaml")
DEEPEST = 50
"""Levels of nesting that params.yaml may have."""
LARGEST = 10**6
"""Values that it may hold once its aliases are written out."""


def load(path: Path = PARAMS, device: bool = True) -> Params:
    """Read and check `path`.

    Args:
        device: whether this machine must have `run.device`; no, if others compute the stages.

    Raises:
        Refusal: the file is missing, no YAML, or has mistakes; a line each, all of them.
    """
    return checked_params(read(path), str(path), device)


def read(path: Path = PARAMS) -> dict[str, Any]:
    """Parse `path` and return its sections, not yet checked.

    Raises:
        Refusal: the file is missing, no YAML, or holds no sections.
    """
    if not path.exists():
        raise Refusal(f"there is no {path} here; run from the root of a prunequant project.")
    try:
        text = path.read_text(encoding="utf-8")
        raw = parsed(text)
        _check_size(raw, path)
        _check_braces(text, path)
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}; make it readable.") from None
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not UTF-8 at byte {error.start}; save it in that encoding.") from None
    except (YAMLError, ValueError) as error:
        raise Refusal(_placed(path, text, error)) from None
    except RecursionError:
        raise Refusal(f"{path} is nested more deeply than {DEEPEST} levels; write it flat.") from None
    if not isinstance(raw, dict):
        content = "is empty" if raw is None else f"holds {type(raw).__name__}"
        raise Refusal(
            f"{path} must be a mapping of sections ({', '.join(Params.model_fields)}), but it {content}."
        )
    return raw


def parsed(text: str) -> Any:
    """Return what a YAML text holds, with the numbers that DVC finds in params.yaml.

    Raises:
        YAMLError: it is not YAML.
        ValueError: a value is out of its range, such as a date.
    """
    return YAML(typ="safe", pure=True).load(text)


def _check_braces(text: str, path: Path) -> None:
    """Refuse YAML that DVC's parser, in C, cannot read though `parsed` can.

    Raises:
        Refusal: a value such as `path:texts` stands without quotes inside braces or brackets.
    """
    try:
        YAML(typ="safe").load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = text.splitlines()[mark.line].strip() if mark else ""
        raise Refusal(
            f"{path}{f':{mark.line + 1}' if mark else ''}: DVC reads no value with a colon inside braces, as "
            f"in `{line[:60]}`; write that entry with a line a setting, without braces."
        ) from None


def unkept_quotes(path: Path = PARAMS) -> str | None:
    """Return the line of `path` that `dvc exp run -S` would break, None if there is none.

    DVC's editor drops quotes, and a value with a colon inside braces cannot be read without.
    """
    kept = StringIO()
    editor = YAML()
    editor.dump(editor.load(path.read_text(encoding="utf-8")), kept)
    try:
        YAML(typ="safe").load(kept.getvalue())
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return kept.getvalue().splitlines()[mark.line].strip() if mark else str(error)
    return None


def _placed(path: Path, text: str, error: Exception) -> str:
    """Say in which line a text stops to be YAML, as `params.yaml:2`, and why."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    position = getattr(error, "position", None)  # of a character that no YAML may have
    line = mark.line if mark else None if position is None else text.count("\n", 0, position)
    parts = (getattr(error, "context", None), getattr(error, "problem", None), getattr(error, "reason", None))
    why = ": ".join(" ".join(part.split()) for part in parts if part) or " ".join(str(error).split())
    return f"{path}{'' if line is None else f':{line + 1}'} is not YAML: {why}; mend it there."


def checked_params(raw: dict[str, Any], where: str = "params.yaml", device: bool = True) -> Params:
    """Check parsed YAML against the schema and each part of it against the others.

    Args:
        device: whether this machine must have `run.device`.

    Raises:
        Refusal: one line a mistake, all of them.
    """
    mistakes: list[str] = []
    broken: set[str] = set()
    try:
        params = _parsed(raw)
    except ValidationError as error:
        answered = {at for at, _ in hashes.lacking(raw)}
        mistakes += [
            sentence(details, Params)
            for details in error.errors()
            if not follows(details) and _of_hash(details) not in answered
        ]
        sound, broken = entries.sound(raw, [details["loc"] for details in error.errors()])
        params = _parsed(sound)
    mistakes += [hashes.answer(at, entry) for at, entry in hashes.lacking(raw)]
    mistakes += [*entries.of_lineage(raw), *checks.between(params, broken, device)]
    _refuse(mistakes, where)
    return params


def _of_hash(error: ErrorDetails) -> str | None:
    """Return the place in params.yaml of the entry whose hash an error is about; None for other errors."""
    loc = error["loc"]
    if loc[-1] != "sha256":
        return None
    inner = loc[2:-1]
    if "nltk_data" in inner:
        return f"{loc[0]}.{loc[1]}.nltk_data"
    if "parts" in inner and isinstance(part := inner[inner.index("parts") + 1], str):
        return f"{loc[0]}.{loc[1]}.parts.{part}"
    return f"{loc[0]}.{loc[1]}"


def load_verified(path: Path = PARAMS, device: bool = True, widths: bool = False) -> Params:
    """Read and check `path`, compare `path:` sources with their hashes, count the windows of texts and the
    tokens of conversations, and look at the user's own tasks.

    Called once a run, not once a stage, as it reads all that these sources hold.

    Args:
        device: whether this machine must have `run.device`.
        widths: whether to compare `in_features` with the models. It takes seconds, and the download does it
            too.

    Raises:
        Refusal: one line a mistake, all of them.
    """
    from stages.job.checks.chat_templates import of_chat_templates  # stages read params too, and need none
    from stages.job.checks.counts import of_windows
    from stages.job.checks.learning import of_conversations
    from stages.job.checks.lengths import of_lengths
    from stages.job.checks.own_tasks import of_tasks
    from stages.job.checks.widths import of_widths

    params = load(path, device)
    _refuse(list(checks.changed_paths(params)), str(path))
    wrong_widths = of_widths(params) if widths else ()
    _refuse([*wrong_widths, *of_tasks(params), *of_conversations(params)], str(path))
    _refuse([*of_chat_templates(params), *of_windows(params)[0]], str(path))
    _refuse([*of_lengths(params)], str(path))  # a chat needs its template to have a length
    return params


def _check_size(raw: Any, path: Path) -> None:
    """Refuse aliases that contain themselves or multiply beyond measure.

    Raises:
        Refusal: more than `LARGEST` values.
        RecursionError: more than `DEEPEST` levels.
    """
    level, count = [raw], 0
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        count += len(level)
        if count > LARGEST:
            raise Refusal(
                f"{path} holds over {LARGEST} values once its aliases are written out; remove them."
            )
        if not level:
            return
    raise RecursionError


def _refuse(mistakes: list[str], where: str) -> None:
    if distinct := list(dict.fromkeys(mistakes)):
        lines = "\n".join(f"  - {line}" for line in distinct)
        raise Refusal(f"{where} has {len(distinct)} problem(s), nothing was run:\n{lines}")


def _parsed(raw: dict[str, Any]) -> Params:
    return Params.model_validate(_tuples(raw))


def _tuples(value: Any) -> Any:
    """Turn YAML's lists into the tuples that the strict, frozen schema holds."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value

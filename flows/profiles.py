"""The measurements of the `profile` stage as a table: a row a candidate and batch size."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from stages.core.errors import Refusal
from stages.core.files import PROFILES, read_json

_NOT_MEASURED = "not measured"


def read_profiles() -> list[dict[str, Any]]:
    """Read every profile, sorted by candidate.

    Raises:
        Refusal: there are no profiles.
    """
    profiles = [read_json(file) for file in sorted(PROFILES.glob("*/*/profile.json"))]
    if not profiles:
        raise Refusal(
            "nothing has been profiled yet; list models under profile.candidates in params.yaml, then run "
            "`prunequant run profile`."
        )
    return profiles


def profile_table(profiles: list[dict[str, Any]]) -> Table:
    """Return medians with their quartiles, ready to print."""
    shown = Table(title=", ".join(sorted(set(map(_machine, profiles)))), title_justify="left")
    for column in (
        "candidate", "batch", "first token, ms", "each token, ms", "tokens/s", "peak MB", "disk MB",
        "J/token", "others busy", "matrices",
    ):  # fmt: skip
        shown.add_column(column, justify="left" if column == "candidate" else "right")
    for profile in profiles:
        for row in _rows(profile):
            shown.add_row(*row)
    return shown


def _rows(profile: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for batch in profile["batches"]:
        joules = batch["joules_per_token"]
        yield (
            profile["candidate"],
            str(batch["batch_size"]),
            _spread(batch["seconds_to_first_token"]),
            _spread(batch["seconds_per_token"]),
            f"{batch['tokens_per_second']:.1f}",
            _megabytes(batch["peak_bytes"]),
            _megabytes(profile["bytes_on_disk"]),
            _NOT_MEASURED if joules is None else f"{joules:.3f}",
            f"{100 * batch['others_busy']:.0f} %",
            ", ".join(f"{count} {kernel}" for kernel, count in profile.get("kernels", {}).items()),
        )


def _machine(profile: dict[str, Any]) -> str:
    device = profile["processor"] if profile["device"] == "cpu" else profile["device"]
    lengths = f"{profile['prompt_tokens']} + {profile['new_tokens']} tokens"
    return f"{device}, {profile['threads']} threads, {profile['dtype']}, {lengths}"


def _spread(seconds: dict[str, float]) -> str:
    median, low, high = (1000 * seconds[key] for key in ("median", "low", "high"))
    return f"{median:.1f} ({low:.1f}-{high:.1f})"


def _megabytes(size: int | None) -> str:
    return _NOT_MEASURED if size is None else f"{size / 1e6:.1f}"

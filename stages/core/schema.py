"""The words every part of `params.yaml` is made of: names, sources, and the strict base class.

A recipe's name becomes a folder, a DVC stage and an argument on a command line, so it is a slug: lower-case
letters, digits and single dashes. A slug cannot leave `data/`, means nothing to a shell, and DVC cannot take
it for nesting (a dot) or for its separator (`@`).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SLUG = r"[a-z0-9]+(?:-[a-z0-9]+)*"
RECIPES = ("prune", "quantize", "teach", "finetune", "noise", "floor")
"""The sections of recipes: every entry has a source."""
CONTROLS = ("noise/", "floor/")
"""Prefixes of candidates that are not compressed models."""
_CANDIDATES = ("base", *(stage for stage in RECIPES if stage != "teach"))
_SOURCES = tuple(stage for stage in _CANDIDATES if f"{stage}/" not in CONTROLS)
LONGEST_NAME = 100
"""Characters of a name: two names and what is put around them make a file name, which has 255 at most."""


def _matches(pattern: str, allowed: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"allowed: {allowed}")
        return value

    return AfterValidator(check)


def _artifact(stages: tuple[str, ...], example: str = "") -> AfterValidator:
    """Require `<stage>/<recipe>` with one of `stages`."""
    words = f"<stage>/<recipe> with stage {', '.join(stages[:-1])} or {stages[-1]}"
    return _matches(rf"(?:{'|'.join(stages)})/{SLUG}", words + example)


def _short(value: str) -> str:
    if len(value) > LONGEST_NAME:
        raise ValueError(
            f"it has {len(value)} characters; allowed: at most {LONGEST_NAME}, as names become those of files"
        )
    return value


Slug = Annotated[
    str,
    _matches(SLUG, "lower-case letters and digits, parts joined by single dashes, such as wanda-50"),
    AfterValidator(_short),
]
Source = Annotated[str, _artifact(_SOURCES, ", such as base/smollm2")]
Base = Annotated[str, _matches(rf"base/{SLUG}", "base/<model>, such as base/smollm2")]
Candidate = Annotated[str, _artifact(_CANDIDATES)]
Sha256 = Annotated[str, _matches(r"[0-9a-f]{64}", "the 64 hexadecimal digits of a sha256")]
Sparsity = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Share of weights that are zero, in [0, 1)."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""The seed of a random draw."""


class Strict(BaseModel):
    """Frozen settings that refuse an unknown field, a string for a number, and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NoData(Strict):
    """The calibration of a data-free method: none, written out."""

    dataset: Annotated[str, _matches("none", "none, as this method reads no data")]


class Recipe(Strict):
    """Settings shared by every compression and recovery recipe."""

    reshapes: ClassVar[bool] = False
    """Whether the linears of the result have other widths than those of the source."""
    source: Source
    ignore: tuple[str, ...] = ()
    """Block-relative names of matrices left alone, such as `mlp.gate`."""
    method: str

    def reads(self) -> dict[str, Any]:
        """Return the settings that name a data set this recipe reads, by their field; each has `dataset`."""
        return {}

    @property
    def refuses(self) -> Mapping[str, str]:
        """Say why these settings cannot serve a family, by its name (a config's `model_type`).

        A family that is not named is tried, and refused only if its structure turns out not to fit.
        """
        return {}

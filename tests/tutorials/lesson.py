"""What a tutorial tells its reader to write, done on the tiny project of the tests."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core.errors import Refusal
from stages.job.load import load_verified
from stages.job.params import Params
from tests import project

FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WRONG_HASH = re.compile(r"- ([\w.-]+)\.sha256: \S+ has ([0-9a-f]{64}); write this hash")
SMALL = {"num_samples": 4, "held_out": 2, "sequence_length": 64, "windows": 2, "steps": 2}


def blocks(name: str, language: str = "yaml", file: str = "") -> list[str]:
    """The tutorial's blocks of a language, those that are the content of `file`, or of none."""
    text = (project.ROOT / "docs" / "tutorials" / f"{name}.md").read_text()
    return [block for kind, title, block in FENCE.findall(text) if (kind, title) == (language, file)]


def add(values: dict[str, Any], block: str) -> None:
    """Add a block to params, for the tiny base and with small numbers."""
    parsed = yaml.safe_load(block.replace("base/smollm2", "base/tiny"))
    merge(values, parsed)
    shrink(values)
    for suite in values["suites"]["perplexity"].values():
        suite.setdefault("sequence_length", SMALL["sequence_length"])


def merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Put `more` over `values`, section by section."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def shrink(value: Any) -> None:
    """Lower the numbers that a tiny model and text cannot serve."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in SMALL and isinstance(inner, int):
                value[key] = min(inner, SMALL[key])
            shrink(inner)


def checked(values: dict[str, Any]) -> Params:
    """Check params as `prunequant check` does, with the hashes that it prints in place of the zeros."""
    project.write(Path(), values)
    with pytest.raises(Refusal) as caught:
        load_verified()
    fixed = WRONG_HASH.findall(str(caught.value))
    assert fixed, str(caught.value)
    for place, right in fixed:
        at = values
        for key in place.split("."):
            at = at[key]
        at["sha256"] = right
    project.write(Path(), values)
    return load_verified()

"""What a tutorial tells its reader to write, done on the tiny project of the tests."""

import re
from pathlib import Path
from typing import Any

import yaml

from flows.fixing import fill_hashes
from stages.job.load import load_verified
from stages.job.params import Params
from tests import project

FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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
    """Check params as `prunequant check --fix` does, which writes the hashes that a tutorial leaves out."""
    project.write(Path(), values)
    assert fill_hashes(Path("params.yaml"))
    return load_verified()

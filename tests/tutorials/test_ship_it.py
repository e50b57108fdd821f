"""The tutorial on shipping a model: each of its commands, in its order, on a tiny sweep that has run."""

import re
import shlex

import pytest

from flows.exporting.card import NO_SCORES
from tests import finished, project
from tests.tutorials import lesson

EXPORTS = ("hf", "gguf", "ollama")


def tiny(text: str) -> str:
    """The tutorial's recipe has groups of 64, which the tiny model's 32 columns do not fill."""
    return text.replace("gptq-w4g64", "gptq-w4g32")


@pytest.mark.drill
def test_its_commands_lead_to_a_model_that_loads(copy):
    for key, value in (("name", "t"), ("email", "t@t")):
        project.run(copy, "git", "config", f"user.{key}", value)
    project.commit(copy, "a sweep that has run")
    start = project.read(copy)
    commands = [
        tiny(line)
        for block in lesson.blocks("ship-it", "console")
        for line in re.findall(r"^\$ (.+)$", block, re.M)
    ]
    seen = {}
    for command in commands:
        if command.startswith("prunequant "):
            seen[command] = finished.prunequant(copy, *shlex.split(command)[1:])
        else:
            seen[command] = project.run(copy, "sh", "-c", command).stdout
    assert commands[-1].endswith("&& echo the same") and seen[commands[-1]].endswith("the same\n")
    assert "quantize/gptq-w4g32" in seen["prunequant show"]
    assert all(word in seen["prunequant diff HEAD"] for word in ("num_samples", "32", "gptq-w4g32"))
    assert project.read(copy) == start, "the change was dropped"
    assert not project.run(copy, "git", "status", "--porcelain").stdout
    head = project.run(copy, "git", "rev-parse", "HEAD").stdout.strip()
    for to in EXPORTS:
        card = (copy / f"exports/gptq-w4g32-{to}/README.md").read_text()
        assert "license: apache-2.0" in card and head in card and NO_SCORES not in card
        assert "exact_match" in card or "arithmetic" in card
    assert (copy / "exports/gptq-w4g32-ollama/Modelfile").read_text() == "FROM ./gptq-w4g32.gguf\n"
    assert (copy / "exports/gptq-w4g32-gguf/gptq-w4g32.gguf").read_bytes()[:4] == b"GGUF"
    (loading,) = lesson.blocks("ship-it", "python")
    assert "The river froze" in project.run(copy, "python", "-c", tiny(loading)).stdout
    weights = "data/models/quantize/gptq-w4g32/model.safetensors"
    ours, again = copy / weights, copy.parent / "again" / weights
    assert again.read_bytes() == ours.read_bytes() and not again.samefile(ours)

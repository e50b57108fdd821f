"""The tutorial on one's own model: each of its commands, in its order, on a tiny model."""

import json
import re
import shlex

import pytest

from tests import finished, project

COMMANDS = [
    shlex.split(line)
    for line in re.findall(r"^\$ (.+)$", (project.ROOT / "docs/tutorials/my-model.md").read_text(), re.M)
]


@pytest.mark.drill
def test_its_commands_lead_to_the_report(tmp_path, inputs):
    folder = finished.make(tmp_path / "project", inputs)
    for name in ("sweeps", "docs"):
        (folder / name).symlink_to(project.ROOT / name)
    for name in ("models", "texts"):
        (folder / name).mkdir()
    (folder / "models/llama").symlink_to(inputs / "llama")
    (folder / "texts/mine.txt").write_text(project.text(3, 120))
    project.run(folder, "git", "config", "user.name", "t")
    project.run(folder, "git", "config", "user.email", "t@t")
    project.commit(folder, "a model and a text")
    seen = {}
    for command in COMMANDS:
        if command[0] == "prunequant":
            seen[command[1]] = finished.prunequant(folder, *command[1:])
        else:
            seen[" ".join(command[:2])] = project.run(folder, *command).stdout
    assert [command[1] for command in COMMANDS[:3]] == ["init", "check", "run"]
    assert "params.yaml is sound: 1 model(s), 5 recipe(s), 6 candidate(s) on 2 suite(s)." in seen["check"]
    assert (folder / "data/report/index.html").exists()
    metrics = json.loads((folder / "data/report/metrics.json").read_text())
    assert {"base/llama", "prune/width-20", "quantize/gptq-w4g32"} < set(metrics)
    assert all(scores["mine"]["perplexity"] > 1 for scores in metrics.values())
    assert "sparsity: 0.6" in (folder / "params.yaml").read_text()
    changed = project.run(folder, "git", "diff", "--numstat", "params.yaml").stdout.split()
    assert changed[:2] == ["1", "1"], "DVC changed one line"
    assert "wanda-50" in seen["dvc metrics"]

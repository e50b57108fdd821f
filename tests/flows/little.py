"""A finished project made by hand, without a run: results, checkpoints of two tensors, and their dvc.lock."""

import hashlib
import json
from pathlib import Path

import torch
import yaml
from dvc.repo import Repo
from safetensors.torch import save_file

from stages.core import tables
from tests import project
from tests.results import of_items

HARM = {"base/m": 0, "quantize/q": 30, "prune/w": 60, "noise/n": 0}
"""Candidates, and how many of 90 items each has lost."""
NASTY = "<script>alert(1)</script> | **x** `y` @somebody ![i](http://a.b/c.png) [red]z[/red] \x1b[31m"
NASTY += " see www.evil.com or a@evil.com now"
"""A prompt and an answer that would be markup, or a link, in any form."""


def params() -> dict:
    """Return params as plain values."""
    calibration = {"dataset": "none"}
    return {
        "run": {"device": "cpu", "dtype": "float32", "threads": 1, "seed": 0},
        "models": {"m": {"source": "path:/home/somebody/m", "sha256": "0"}},
        "datasets": {"s": {"source": "https://somebody:s3cret@host/s", "api_key": "s3cret"}},
        "prune": {"w": {"source": "base/m", "method": "magnitude", "sparsity": 0.5}},
        "quantize": {"q": {"source": "base/m", "method": "rtn", "bits": 4, "calibration": calibration}},
        "noise": {"n": {"source": "base/m", "batch_size": 3}},
        "suites": {"graded": {"s": {"shots": 1}}},
        "evaluate": {"candidates": list(HARM)},
        "report": {"margin": 0.02},
    }


def make(folder: Path) -> Path:
    """Write the project into a new folder and commit it; there is also a branch `prune/w`.

    Its DVC remote is the folder `shared` beside it, which holds everything, as does its cache.
    """
    folder.mkdir(parents=True)
    project.run(folder, "git", "init", "-q", "-b", "main")
    Repo.init(str(folder)).close()
    (folder / ".gitignore").write_text("/data/\n")
    config = "[core]\n    remote = shared\n['remote \"shared\"']\n    url = ../../shared\n"
    (folder / ".dvc/config").write_text(config)
    project.write(folder, params())
    stages = {}
    for candidate, lost in HARM.items():
        model = folder / "data/models" / candidate
        model.mkdir(parents=True)
        weights = {
            "embed.weight": torch.ones(4, 2),
            "layers.0.up.weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]])
            * (1.5 if candidate == "quantize/q" else 1),
        }
        if candidate == "prune/w":
            weights["layers.0.up.weight"][0, 0] = 0
        save_file(weights, model / "model.safetensors")
        record = {"numerics": {"cpu_capability": "AVX2" if candidate != "quantize/q" else "AVX512"}}
        (model / "artifact.json").write_text(json.dumps(record))
        result = folder / "data/results" / candidate / "s"
        result.mkdir(parents=True)
        answers = of_items(
            {candidate: [0.0] * lost + [1.0] * (90 - lost)}, readout="generation", metric="exact_match"
        )
        samples = answers.samples.assign(response=NASTY)
        scores = answers.scores.drop(columns=tables.PARAMETERS_REMOVED).assign(stderr=0.05)
        tables.write_tables(result, scores, samples)
        if candidate == "base/m":
            items = samples.reindex(columns=list(tables.ITEM_COLUMNS)).assign(prompt=f"2 + 2 = {NASTY}")
            items.astype(tables.ITEM_COLUMNS).to_parquet(result / tables.ITEMS, index=False)
        for kind, path in (("make", model), ("graded", result)):
            out = {"path": str(path.relative_to(folder)), "hash": "md5", "size": 10**6}
            stages[f"{kind}@{candidate}"] = {"deps": [], "outs": [out | {"md5": _store(folder, path)}]}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    project.commit(folder, "made by hand")
    project.run(folder, "git", "branch", "prune/w")
    return folder


def _store(folder: Path, out: Path) -> str:
    """Put an output into DVC's cache and remote; return its md5."""
    entries, contents = [], {}
    for file in sorted(out.iterdir()):
        md5 = hashlib.md5(file.read_bytes()).hexdigest()
        entries.append({"md5": md5, "relpath": file.name})
        contents[md5] = file.read_bytes()
    tree = json.dumps(entries).encode()
    whole = f"{hashlib.md5(tree).hexdigest()}.dir"
    for place in (folder / ".dvc/cache", folder.parent / "shared"):
        for md5, content in (contents | {whole: tree}).items():
            stored = place / "files/md5" / md5[:2] / md5[2:]
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_bytes(content)
    return whole

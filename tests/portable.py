"""A tiny portable job: `python -m tests.portable` makes it in the working folder and prints its hashes.

Its weights are whole numbers over a power of two, so that the inputs are the same bytes everywhere too.
"""

import json
from pathlib import Path

import pandas as pd
import torch

from stages.core import portable
from stages.core.files import MODELS, RESULTS, sha256, text_sha256
from stages.core.tables import SCORES
from tests import families, project
from tests.pipeline import checked, do, evaluate, params
from tests.recipes import GPTQ, LORA, WANDA

JOB = {
    "prune/wanda": {"source": "base/tiny", **WANDA},
    "quantize/gptq": {"source": "base/tiny", **GPTQ},
    "finetune/lora": {"source": "prune/wanda", **LORA},
    "noise/rounding": {"source": "base/tiny", "rounding": {"size": 2.0**-9, "seed": 0}},
}
SCORED = ("base/tiny", "finetune/lora", "noise/rounding")


def hashes() -> dict[str, str]:
    """Make the job and return the hash of every checkpoint's weights and of every score."""
    project.write_inputs(Path("inputs"))
    families.tokenizer().save_pretrained("inputs/llama")
    model = families.model("llama").cpu().float()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        whole = torch.randint(-(2**9), 2**9, parameter.shape, generator=draw)
        parameter.data = whole / 2**12 if parameter.dim() > 1 else torch.ones_like(parameter)
    model.save_pretrained("inputs/llama")
    raw = params("llama", JOB).model_dump(mode="json")
    raw["run"] |= {"device": "cpu", "dtype": "float32", "numerics": "portable"}
    raw["evaluate"] = {"candidates": list(SCORED)}
    chosen = checked(raw)
    do(chosen)
    found = {
        artifact: text_sha256("".join(map(sha256, sorted((MODELS / artifact).glob("*.safetensors")))))
        for artifact in ("base/tiny", *JOB)
    }
    for candidate in SCORED:
        evaluate(chosen, f"{candidate}/news")
        scores = pd.read_parquet(RESULTS / candidate / "news" / SCORES)
        found[f"{candidate}/news"] = text_sha256(repr(scores["value"].tolist()))
    return found


if __name__ == "__main__":
    portable.hold_kernels()
    print(portable.ignored_switch() or json.dumps(hashes()))  # noqa: T201

"""An evaluation that was killed asks only what was not finished, and ends as one that was not."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from stages.core.run import Run
from stages.evaluation.kept import KEPT, Finished
from tests.pipeline import do, download, evaluate, params

RUN = Run(device="cpu", dtype="bfloat16", threads=1, seed=0)


def test_a_killed_evaluation_goes_on_where_it_was(workspace, monkeypatch):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    folder = Path("data/results/base/tiny/arithmetic")
    evaluate(chosen, "base/tiny/arithmetic")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert not list(KEPT.glob("*/*/*"))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HFLM, "generate_until", killed)
        evaluate(chosen, "base/tiny/arithmetic")
    (kept,) = KEPT.glob("*/*/*")
    assert len(json.loads(kept.read_text())["answers"]) == 16  # four items of four choices

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", killed)
    monkeypatch.setattr("stages.evaluation.shared.SharedPrefixLM._loglikelihood_tokens", killed)
    evaluate(chosen, "base/tiny/arithmetic")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert not list(KEPT.glob("*/*/*"))


def draw(finished: Finished, requests: list[str]) -> list[float]:
    return finished.take("generate_until", requests, lambda: torch.rand(3).tolist())


def test_random_draws_go_on_as_if_all_had_been_asked(workspace):
    do(params("llama", {}))
    torch.manual_seed(5)
    first = Finished("base/tiny", "news", 4, RUN)
    whole = [draw(first, ["a"]), draw(first, ["b"])]
    file = max(KEPT.glob("*/*/*"), key=lambda one: one.stat().st_mtime_ns)
    file.unlink()
    torch.manual_seed(5)
    again = Finished("base/tiny", "news", 4, RUN)
    assert again.take("generate_until", ["a"], lambda: pytest.fail("asked again")) == whole[0]
    assert draw(again, ["b"]) == whole[1]


@pytest.mark.parametrize("change", ["seed", "batch", "model", "draws", "request"])
def test_what_answers_depend_on_is_asked_again(change, workspace):
    do(params("llama", {}))
    torch.manual_seed(5)
    draw(Finished("base/tiny", "news", 4, RUN), ["a"])
    run = RUN.model_copy(update={"seed": 1}) if change == "seed" else RUN
    if change == "model":
        with Path("data/models/base/tiny/config.json").open("a") as config:
            config.write("\n")
    torch.manual_seed(6 if change == "draws" else 5)
    asked = []
    Finished("base/tiny", "news", 5 if change == "batch" else 4, run).take(
        "generate_until", ["b" if change == "request" else "a"], lambda: asked.append(1) or [0.0]
    )
    assert asked == [1]

"""An evaluation that was killed asks only unfinished tasks, and ends with the bytes of one that was not."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from stages.core.run import Run
from stages.evaluation.kept import ANSWERS, KeptAnswers
from tests import families
from tests.pipeline import do, download, evaluate, params

RUN = Run(device=families.DEVICE, dtype="bfloat16", threads=1, seed=0, numerics="fast")


def test_a_killed_evaluation_goes_on_where_it_was(workspace, monkeypatch):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    folder = Path("data/results/base/tiny/arithmetic")
    evaluate(chosen, "base/tiny/arithmetic")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert not list(ANSWERS.glob("*/*/*"))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HFLM, "generate_until", killed)
        evaluate(chosen, "base/tiny/arithmetic")
    (kept,) = ANSWERS.glob("*/*/*")
    assert len(json.loads(kept.read_text())["answers"]) == 16  # four items of four choices

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", killed)
    monkeypatch.setattr("stages.evaluation.shared.SharedPrefixLM._loglikelihood_tokens", killed)
    evaluate(chosen, "base/tiny/arithmetic")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert not list(ANSWERS.glob("*/*/*"))


def kept_answers(run: Run = RUN, batch_size: int = 4) -> KeptAnswers:
    return KeptAnswers("base/tiny", "news", batch_size, run, "stages.evaluation.perplexity", "transformers")


def draw(answers: KeptAnswers, requests: list[str]) -> list[float]:
    return answers.take("generate_until", requests, lambda: torch.rand(3).tolist())


def test_random_draws_go_on_as_if_all_had_been_asked(workspace):
    do(params("llama", {}))
    torch.manual_seed(5)
    answers = kept_answers()
    whole = [draw(answers, ["a"]), draw(answers, ["b"])]
    newest = max(ANSWERS.glob("*/*/*"), key=lambda file: file.stat().st_mtime_ns)
    newest.unlink()
    torch.manual_seed(5)
    again = kept_answers()
    assert again.take("generate_until", ["a"], lambda: pytest.fail("asked again")) == whole[0]
    assert draw(again, ["b"]) == whole[1]


@pytest.mark.parametrize("change", ["seed", "batch", "model", "draws", "request"])
def test_answers_are_asked_again_after_a_change_they_depend_on(change, workspace):
    do(params("llama", {}))
    torch.manual_seed(5)
    draw(kept_answers(), ["a"])
    run = RUN.model_copy(update={"seed": 1}) if change == "seed" else RUN
    if change == "model":
        with Path("data/models/base/tiny/config.json").open("a") as config:
            config.write("\n")
    torch.manual_seed(6 if change == "draws" else 5)
    asked = []
    kept_answers(run, 5 if change == "batch" else 4).take(
        "generate_until", ["b" if change == "request" else "a"], lambda: asked.append(True) or [0.0]
    )
    assert asked == [True]

"""The benchmark of few-shot likelihoods, on a tiny model."""

import json

from benchmarks import fewshot
from tests import families


def test_both_sides_choose_the_same_and_all_figures_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fewshot, "EXAMPLES", 40)
    model = families.save("llama", tmp_path / "model")
    arguments = ["fewshot", str(model), "--items", "3", "--runs", "1", "--threads", "1", "--batch-size", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    fewshot.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {line["figure"]: line["value"] for line in printed}
    assert figures["fewshot.choices_identical"] and figures["fewshot.log_likelihood_difference"] < 1e-3
    assert figures["fewshot.batch_size"] == 2
    for name in ("items_per_second", "items_per_second_lm_eval", "times_faster_than_lm_eval"):
        assert figures[f"fewshot.{name}"] > 0

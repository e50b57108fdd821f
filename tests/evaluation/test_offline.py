"""What lm-eval's tasks would fetch is refused, or served from here."""

import importlib
import sys

import pytest

from stages.core.errors import Refusal
from stages.evaluation import offline
from stages.evaluation.programs import CodeEval
from tests.scoring import scored
from tests.stock import mirrored


def test_data_that_nltk_would_fetch_is_refused(workspace, few_stock_tasks, monkeypatch):
    chosen = mirrored("ifeval", {"max_gen_toks": 8})
    for module in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(Refusal, match=r"the task needs nltk's punkt_tab, .* set nltk_data of its data set"):
        scored(chosen, "base/tiny", "ifeval")


def test_nltk_downloads_nothing_whenever_it_is_imported(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "nltk"]:
        monkeypatch.delitem(sys.modules, module)
    offline.fetch_nothing()
    nltk = importlib.import_module("nltk")
    for module in [name for name in sys.modules if name.split(".")[0] == "nltk"]:
        monkeypatch.setitem(sys.modules, module, sys.modules[module])
    with pytest.raises(Refusal, match="needs nltk's punkt"):
        nltk.download("punkt")


def test_scripts_of_metrics_are_not_fetched():
    offline.fetch_nothing()
    library = importlib.import_module("evaluate")
    assert isinstance(library.load("code_eval"), CodeEval)
    with pytest.raises(Refusal, match="metric bleu is a script on the hub"):
        library.load("bleu")

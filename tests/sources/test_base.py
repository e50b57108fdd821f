"""Downloads of models: only what params declare, or nothing."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources import base
from tests import families
from tests.model import test_causal
from tests.pipeline import params


def test_other_content_than_hashed_is_refused_and_nothing_is_left(workspace):
    chosen = params("llama", {})
    wrong = chosen.models["tiny"].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(Refusal, match="its sha256 is"):
        wrong.download("tiny", chosen.run)
    assert not list(Path("data").rglob("tiny/*"))


def test_other_widths_than_declared_are_refused(workspace):
    chosen = params("llama", {})
    wrong = chosen.models["tiny"].model_copy(update={"in_features": (32, 128)})
    with pytest.raises(Refusal, match=r"models\.tiny\.in_features is \[32, 128\], .* write .*\[32, 64\]"):
        wrong.download("tiny", chosen.run)
    assert not Path("data/models/base/tiny").exists()


def test_a_model_that_looks_ahead_is_refused(own_inputs):
    folder = own_inputs / "bert"
    test_causal.model("bert").save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    chosen = params("llama", {})
    ahead = chosen.models["tiny"].model_copy(update={"source": "path:inputs/bert", "sha256": sha256(folder)})
    with pytest.raises(Refusal, match="this bert model looks ahead"):
        ahead.download("tiny", chosen.run)
    assert not Path("data/models/base/tiny").exists()


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), NotImplementedError("no kernel")])
def test_only_a_kernel_that_a_device_lacks_may_keep_a_model_untried(error, workspace, monkeypatch):
    monkeypatch.setattr(base, "check_causal", Mock(side_effect=error))
    chosen = params("llama", {})
    if isinstance(error, NotImplementedError):
        chosen.models["tiny"].download("tiny", chosen.run)
        return
    with pytest.raises(Refusal, match=r"^models\.tiny is llama, which fails on .* size mismatch\); use"):
        chosen.models["tiny"].download("tiny", chosen.run)
    assert not Path("data/models/base/tiny").exists()

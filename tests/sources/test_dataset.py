"""Downloads of data sets: only what params declare, or nothing."""

from pathlib import Path

import pytest

from stages.core.errors import Refusal
from tests.pipeline import params


def test_other_content_than_hashed_is_refused_and_nothing_is_left(workspace):
    wrong = params("llama", {}).datasets["news"].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(Refusal, match="its sha256 is"):
        wrong.download("news")
    assert not list(Path("data").rglob("news/*"))

"""Windows: distinct, unpadded, enough of them, and apart from those that evaluate."""

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core import calibration
from stages.core.calibration import Calibration, calibration_windows, documents, windows
from stages.core.errors import Refusal
from stages.core.params import load
from stages.download.text import split
from tests import families, project

TOKENIZER = families.tokenizer()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write documents as the calibration split of data set `news`."""
    monkeypatch.setattr(calibration, "DATASETS", tmp_path)
    monkeypatch.setattr(calibration.documents, "__defaults__", (tmp_path,))
    (tmp_path / "news").mkdir()

    def write(texts: list[str], name: str = "calibration") -> None:
        pd.DataFrame({"text": texts}).to_parquet(tmp_path / "news" / f"{name}.parquet")

    return write


@given(st.lists(st.text("abc ", min_size=1, max_size=30), min_size=1, max_size=10), st.integers(2, 12))
def test_windows_are_the_text_cut_up(texts, length):
    cut = windows(TOKENIZER, texts, length)
    whole = TOKENIZER("\n\n".join(texts), add_special_tokens=False).input_ids
    assert cut.dtype == torch.int64
    assert cut.shape == (len(whole) // length, length)
    assert cut.flatten().tolist() == whole[: cut.numel()]


def test_the_defaults_settings_give_distinct_windows_apart_from_evaluation(written):
    wanted = [
        r.calibration
        for r in load(project.ROOT / "params.yaml").recipes().values()
        if hasattr(r, "calibration")
    ]
    wanted = [c for c in wanted if isinstance(c, Calibration)]
    assert wanted
    for chosen in wanted:
        assert chosen.num_samples >= 64
        seen, evaluation, _ = split(project.text(5, documents=400).splitlines(), 0.5)
        written(seen)
        written(evaluation, "evaluation")
        taken = calibration_windows(TOKENIZER, chosen)
        assert taken.shape == (chosen.num_samples, chosen.sequence_length)
        assert len({tuple(row) for row in taken.tolist()}) == chosen.num_samples
        assert not (taken == TOKENIZER.pad_token_id).any()
        judged = windows(TOKENIZER, documents("news", "evaluation"), chosen.sequence_length)
        assert not {tuple(row) for row in taken.tolist()} & {tuple(row) for row in judged.tolist()}


def test_windows_are_spread_over_the_whole_split(written):
    written(["".join(chr(97 + i) * 8 for i in range(20))])
    taken = calibration_windows(TOKENIZER, Calibration(dataset="news", num_samples=4, sequence_length=8))
    firsts = [TOKENIZER.decode(row)[0] for row in taken]
    assert firsts[0] == "a" and firsts[-1] == "t" and firsts == sorted(firsts)


def test_repeated_windows_count_once(written):
    written(["a" * 8 * 50 + "b" * 8])
    assert (
        len(calibration_windows(TOKENIZER, Calibration(dataset="news", num_samples=2, sequence_length=8)))
        == 2
    )
    with pytest.raises(
        Refusal, match=r"3 windows of 8 tokens were asked for, .* holds 2 distinct ones; lower"
    ):
        calibration_windows(TOKENIZER, Calibration(dataset="news", num_samples=3, sequence_length=8))


def test_too_short_a_text_is_refused(written):
    written(["a"])
    with pytest.raises(Refusal, match="holds 0 distinct ones"):
        calibration_windows(TOKENIZER, Calibration(dataset="news", num_samples=1, sequence_length=8))

"""Windows: distinct, unpadded, enough of them, apart from those that evaluate, and known to the model."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.core.tables import subject
from stages.corpus.windows import (
    Calibration,
    Windows,
    calibration_windows,
    cut_windows,
    read_documents,
    text_token_ids,
)
from stages.job.load import load
from stages.sources.documents import split_calibration
from stages.sources.graded.arithmetic import Arithmetic, ArithmeticLevel
from tests import families, fewrows, project
from tests.lessons import SUMS
from tests.pipeline import TEXT, do, download, params, prune, record

TOKENIZER = families.tokenizer()
GENERATED = {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8}
RANDOM = {"dataset": "none", "tokens": "random", "seed": 0}


def write_news(texts: list[str], split: str = "calibration") -> None:
    """Write documents as a split of data set `news`."""
    folder = DATASETS / "news"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"text": texts}).to_parquet(folder / f"{split}.parquet")


def calibration(**options) -> Calibration:
    return Calibration(**{"dataset": "news", "num_samples": 6, "sequence_length": 24, **options})


def windows(chosen: Windows, vocab_size: int = families.VOCAB) -> torch.Tensor:
    return calibration_windows(TOKENIZER, chosen, vocab_size)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@given(st.lists(st.text("abc ", min_size=1, max_size=30), min_size=1, max_size=10), st.integers(2, 12))
def test_windows_are_the_text_cut_up(texts, length):
    cut = cut_windows(TOKENIZER, texts, length)
    whole = TOKENIZER("\n\n".join(texts), add_special_tokens=False).input_ids
    assert cut.dtype == torch.int64
    assert cut.shape == (len(whole) // length, length)
    assert cut.flatten().tolist() == whole[: cut.numel()]


def test_the_default_jobs_windows_are_distinct_and_apart_from_evaluation(folder):
    texts = [
        text
        for recipe in load(project.ROOT / "params.yaml").recipes().values()
        for text in recipe.reads().values()
        if isinstance(text, Calibration)
    ]
    assert texts
    learned, evaluation, _ = split_calibration(project.text(5, documents=400).splitlines(), 0.5)
    write_news(learned)
    write_news(evaluation, "evaluation")
    for chosen in {(text.num_samples, text.sequence_length): text for text in texts}.values():
        assert chosen.num_samples >= 64
        rows = windows(chosen)
        assert rows.shape == (chosen.num_samples, chosen.sequence_length)
        assert len({tuple(row) for row in rows.tolist()}) == chosen.num_samples
        assert not (rows == TOKENIZER.pad_token_id).any()
        scored = cut_windows(TOKENIZER, read_documents("news", "evaluation"), chosen.sequence_length)
        assert not {tuple(row) for row in rows.tolist()} & {tuple(row) for row in scored.tolist()}


def test_windows_are_spread_over_the_whole_split(folder):
    write_news(["".join(chr(97 + i) * 8 for i in range(20))])
    rows = windows(calibration(num_samples=4, sequence_length=8))
    firsts = [TOKENIZER.decode(row)[0] for row in rows]
    assert firsts[0] == "a" and firsts[-1] == "t" and firsts == sorted(firsts)


def test_a_seed_draws_other_windows_in_another_order(folder):
    write_news(["".join(chr(97 + i) * 8 for i in range(20))])
    first, again, other = (
        windows(calibration(num_samples=6, sequence_length=8, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    texts = [[TOKENIZER.decode(row)[0] for row in rows] for rows in (first, other)]
    assert texts[0] != texts[1] and all(len(set(text)) == 6 and text != sorted(text) for text in texts)
    assert len(windows(calibration(num_samples=20, sequence_length=8, seed=3))) == 20
    with pytest.raises(Refusal, match="fewer than 21"):
        windows(calibration(num_samples=21, sequence_length=8, seed=3))


def test_repeated_windows_count_once(folder):
    write_news(["a" * 8 * 50 + "b" * 8])
    assert len(windows(calibration(num_samples=2, sequence_length=8))) == 2
    with pytest.raises(Refusal, match=r"news has 2 distinct windows of 8 tokens .*fewer than 3; lower"):
        windows(calibration(num_samples=3, sequence_length=8))


def test_too_short_a_text_is_refused(folder):
    write_news(["a"])
    with pytest.raises(Refusal, match="news has 0 distinct windows"):
        windows(calibration(num_samples=1, sequence_length=8))


def test_only_the_training_items_of_a_graded_data_set_are_read(folder):
    level = ArithmeticLevel(name="add", operator="+", digits=2, carries=False)
    dataset = Arithmetic(kind="arithmetic", levels=(level,), test=5, train=40, fewshot=1, seed=0)
    dataset.download("sums")
    documents = read_documents("sums", "train")
    items = {split: pd.read_parquet(DATASETS / f"sums/{split}.parquet") for split in ("train", "test")}
    assert len(documents) == 40
    assert documents[0] == f"{items['train']['question'][0]} {items['train']['answer'][0]}"
    whole = "\n".join(documents)
    assert all(TOKENIZER.decode(row) in whole for row in windows(calibration(dataset="sums")))
    assert not any(f"{question} " in whole for question in items["test"]["question"])


def test_random_tokens_are_drawn_evenly_from_those_of_text():
    many = RANDOM | {"num_samples": 200, "sequence_length": 512}
    rows = windows(calibration(**many))
    counts = torch.bincount(rows.flatten(), minlength=families.VOCAB).double()
    assert rows.shape == (200, 512)
    assert counts[TOKENIZER.all_special_ids].sum() == 0
    assert len(counts) == families.VOCAB
    expected = rows.numel() / 256
    assert ((counts[:256] - expected).abs() < 6 * expected**0.5).all()
    assert torch.equal(rows, windows(calibration(**many)))
    assert not torch.equal(rows[:6, :24], windows(calibration(**RANDOM | {"seed": 1})))


def test_random_tokens_do_not_depend_on_rows_that_no_token_has():
    """A model may have more rows than its tokenizer has tokens, to fill its embedding up."""
    assert torch.equal(windows(calibration(**RANDOM)), windows(calibration(**RANDOM), families.VOCAB + 5))


def test_every_special_token_is_left_out():
    tokenizer = families.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<image>"]})
    assert text_token_ids(tokenizer, len(tokenizer)).tolist() == list(range(256))


def test_every_token_has_a_row_in_the_models_embedding(folder):
    """The tokenizer has 259 tokens, the embedding 200 rows; the id of a space is above them."""
    assert len(TOKENIZER) == 259
    assert windows(calibration(**RANDOM | {"num_samples": 64}), 200).max() == 199
    write_news(["abcd efgh " * 40])
    with pytest.raises(Refusal, match=r"news: token ' ' has id 220, but the model's embedding has 200 rows;"):
        windows(calibration(num_samples=1), 200)


def test_a_model_with_fewer_rows_than_its_tokenizer_has_tokens_is_pruned(workspace):
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5}
    resp = {"source": "base/tiny", "method": "resp", "sparsity": 0.5, "scope": "row", "steps": 2}
    depth = {"source": "base/tiny", "method": "depth", "metric": "greedy", "blocks": 1}
    recipes = {
        "prune/random": wanda | {"calibration": TEXT | RANDOM},
        "prune/text": wanda | {"calibration": TEXT},
        "prune/generated": wanda | {"calibration": TEXT | GENERATED},
        "prune/resp": resp | {"calibration": TEXT | GENERATED},
        "prune/items": depth | {"calibration": {"dataset": "sums", "shots": 0}},
    }
    chosen = fewrows.use(params("llama", recipes, datasets={"sums": SUMS}))
    download(chosen, "datasets/sums")
    do(chosen, ["prune/random"])
    for name in ("text", "generated", "resp", "items"):
        with pytest.raises(Refusal, match=r"token .* has id .* embedding has 200 rows"):
            prune(chosen, name)
    # Text that the model knows is continued with tokens that it knows.
    news = pd.read_parquet(DATASETS / "news/calibration.parquet")
    write_news(news["text"].str.replace(" ", "").tolist())
    for name in ("text", "generated", "resp"):
        prune(chosen, name)


@pytest.mark.parametrize(
    "options", [{"tokens": "random"}, {"dataset": "none", "tokens": "random"}, GENERATED | {"seed": None}]
)
def test_settings_that_do_not_go_together_are_refused(options):
    with pytest.raises(ValidationError, match=r"tokens (random|generated) (needs seed|reads no data set)"):
        calibration(**options)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "prune: news (path:inputs) 4x32"),
        ({"seed": 1}, "prune: news (path:inputs) 4x32 seed 1"),
        ({"tokens": "random", "dataset": "none", "seed": 1}, "prune: random tokens 4x32"),
        (GENERATED, "prune: generated from news (path:inputs) 4x32"),
    ],
)
def test_recipes_calibrate_on_every_kind_and_tables_name_it(options, label, workspace):
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT | options}
    do(params("llama", {"prune/made": wanda}))
    assert record("prune/made")["sparsity"] == 0.5
    assert subject(record("prune/made")).calibration == label

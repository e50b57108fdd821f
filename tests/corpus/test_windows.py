"""Windows: distinct, unpadded, enough of them, and apart from those that evaluate; of text or drawn."""

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from stages.core.errors import Refusal
from stages.core.tables import describe
from stages.corpus.generation import continued, model_windows
from stages.corpus.windows import Calibration, calibration_windows, documents, ordinary, windows
from stages.job.load import load
from stages.sources.graded.arithmetic import Arithmetic, Level
from stages.sources.text import split
from tests import families, project
from tests.pipeline import TEXT, do, params, record

TOKENIZER = families.tokenizer()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write documents as the calibration split of data set `news`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "datasets" / "news"
    folder.mkdir(parents=True)

    def write(texts: list[str], name: str = "calibration") -> None:
        pd.DataFrame({"text": texts}).to_parquet(folder / f"{name}.parquet")

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


GENERATED = {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8}


def wanted(**options) -> Calibration:
    return Calibration(**{"dataset": "news", "num_samples": 6, "sequence_length": 24, **options})


def random_tokens(**options) -> Calibration:
    return wanted(dataset="none", tokens="random", **{"seed": 0, **options})


def generated(family: str = "llama", model: torch.nn.Module | None = None, **options) -> torch.Tensor:
    made = model or families.model(family).float()
    return model_windows(TOKENIZER, wanted(**{**GENERATED, **options}), lambda: made)


def test_a_graded_data_set_is_learned_from_by_its_training_items(written):
    level = Level(name="add", operator="+", digits=2, carries=False)
    dataset = Arithmetic(kind="arithmetic", levels=(level,), test=5, train=40, fewshot=1, seed=0)
    dataset.download("sums")
    cut = calibration_windows(TOKENIZER, wanted(dataset="sums"))
    said = documents("sums", "train")
    items = {split: pd.read_parquet(f"data/datasets/sums/{split}.parquet") for split in ("train", "test")}
    assert len(said) == 40
    assert said[0] == f"{items['train']['question'][0]} {items['train']['answer'][0]}"
    whole = "\n".join(said)
    assert all(TOKENIZER.decode(row) in whole for row in cut)
    assert not any(f"{question} " in whole for question in items["test"]["question"])


def test_text_asks_for_no_model(written):
    written(project.text(3).splitlines())

    def whole():
        raise AssertionError("loaded")

    for chosen in (wanted(), random_tokens()):
        assert torch.equal(model_windows(TOKENIZER, chosen, whole), calibration_windows(TOKENIZER, chosen))
    with pytest.raises(ValueError, match="model_windows"):
        calibration_windows(TOKENIZER, wanted(**GENERATED))


def test_random_tokens_are_drawn_evenly_from_the_ordinary_ones():
    made = calibration_windows(TOKENIZER, random_tokens(num_samples=200, sequence_length=512))
    counts = torch.bincount(made.flatten(), minlength=families.VOCAB).double()
    assert made.shape == (200, 512)
    assert counts[TOKENIZER.all_special_ids].sum() == 0
    assert len(counts) == families.VOCAB
    expected = made.numel() / 256
    assert ((counts[:256] - expected).abs() < 6 * expected**0.5).all()
    assert torch.equal(
        made, calibration_windows(TOKENIZER, random_tokens(num_samples=200, sequence_length=512))
    )
    assert not torch.equal(made[:6, :24], calibration_windows(TOKENIZER, random_tokens(seed=1)))


def test_every_special_token_is_left_out():
    tokenizer = families.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<image>"]})
    assert ordinary(tokenizer).tolist() == list(range(256))


@pytest.mark.parametrize("family", families.CONFIGS)
def test_generated_windows_are_the_models_own(family, written):
    """Against a generation without cache, one window and token at a time."""
    written(project.text(3).splitlines())
    model = families.model(family).float()
    made = generated(model=model)
    texts = calibration_windows(TOKENIZER, wanted())
    assert torch.equal(made[:, :8], texts[:, :8])
    assert made.shape == (6, 24) and not torch.equal(made, texts)
    uniform = torch.rand(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, numbers in zip(made, uniform, strict=True):
        for place, number in enumerate(numbers, start=8):
            with torch.no_grad():
                logits = model(input_ids=row[None, :place], use_cache=False).logits[0, -1]
            likely = logits.double()[:256].softmax(0)
            drawn = int(row[place])
            below = float(likely[:drawn].sum())
            assert below - 1e-4 <= number <= below + float(likely[drawn]) + 1e-4


def test_generated_windows_depend_on_the_seed_alone(written):
    written(project.text(3).splitlines())
    made = generated()
    assert torch.equal(made, generated())
    assert torch.equal(made, generated(batch_size=2, sequential="block"))
    assert not torch.equal(made[:, 8:], generated(seed=1)[:, 8:])
    assert not torch.isin(made, torch.tensor(TOKENIZER.all_special_ids)).any()
    assert len({tuple(row) for row in made.tolist()}) == len(made)


def test_a_low_temperature_is_greedy(written):
    written(project.text(3).splitlines())
    model = families.model("llama").float()
    prompts = calibration_windows(TOKENIZER, wanted())[:, :8]
    made = continued(model, prompts, torch.rand(6, 8, dtype=torch.float64), torch.arange(256), 1e-6)
    with torch.no_grad():
        greedy = model(input_ids=made, use_cache=False).logits[:, 7:-1, :256].argmax(2)
    assert torch.equal(made[:, 8:], greedy)


def test_a_model_without_a_cache_is_refused_by_name(written):
    written(project.text(3).splitlines())
    config = OpenAIGPTConfig(vocab_size=families.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Refusal, match=r"^OpenAIGPTLMHeadModel hands out no keys and values of the tokens"):
        generated(model=model)


def test_windows_that_come_out_alike_are_refused(written):
    written(["abcdefgh" + "x" * 8 + "abcdefgh" + "y" * 8])
    with pytest.raises(Refusal, match="generated 1 distinct windows where 2 were asked for; raise temp"):
        generated(num_samples=2, sequence_length=16, temperature=1e-6)


def test_windows_longer_than_the_model_reads_are_refused(written):
    written(project.text(3).splitlines())
    with pytest.raises(Refusal, match="sequence_length 300 is more than the 256 tokens"):
        generated("opt", sequence_length=300)


@pytest.mark.parametrize(
    "options", [{"tokens": "random"}, {"dataset": "none", "tokens": "random"}, GENERATED | {"seed": None}]
)
def test_settings_that_do_not_go_together_are_refused(options):
    with pytest.raises(ValidationError, match=r"tokens (random|generated) (needs seed|reads no data set)"):
        wanted(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "prune: news (path:inputs) 4x32"),
        ({"tokens": "random", "dataset": "none", "seed": 1}, "prune: random tokens 4x32"),
        (GENERATED, "prune: generated from news (path:inputs) 4x32"),
    ],
)
def test_recipes_calibrate_on_every_kind_and_scores_say_which(options, said, workspace):
    wanda = {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT | options}
    do(params("llama", {"prune/made": wanda}))
    told = record("prune/made")
    assert told["sparsity"] == 0.5
    assert describe(told)["calibration"] == said

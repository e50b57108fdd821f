"""Generated windows: the model's own continuations, drawn at numbers that the seed alone decides."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from stages.core.errors import Refusal
from stages.corpus.generation import continue_prompts, model_windows
from stages.corpus.windows import Calibration, calibration_windows
from tests import families, project
from tests.corpus.test_windows import GENERATED, RANDOM, TOKENIZER, calibration, windows, write_news

pytestmark = pytest.mark.device


@pytest.fixture(autouse=True)
def news(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_news(project.text(3).splitlines())


def generated(family: str = "llama", model: torch.nn.Module | None = None, **options) -> torch.Tensor:
    whole = model or families.model(family).float()
    return model_windows(TOKENIZER, calibration(**GENERATED | options), families.VOCAB, lambda: whole)


@pytest.mark.parametrize("chosen", [calibration(), calibration(**RANDOM)], ids=["text", "random"])
def test_other_windows_need_no_model(chosen: Calibration):
    rows = model_windows(TOKENIZER, chosen, families.VOCAB, lambda: pytest.fail("the model was loaded"))
    assert torch.equal(rows, windows(chosen))


def test_generated_windows_need_the_model():
    with pytest.raises(ValueError, match="model_windows"):
        calibration_windows(TOKENIZER, calibration(**GENERATED), families.VOCAB)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_generated_windows_are_the_models_own(family):
    """Compare with generation without a cache, one window and token at a time."""
    model = families.model(family).float()
    rows = generated(model=model)
    texts = windows(calibration())
    assert torch.equal(rows[:, :8], texts[:, :8])
    assert rows.shape == (6, 24) and not torch.equal(rows, texts)
    uniform = torch.rand(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, numbers in zip(rows, uniform, strict=True):
        for place, number in enumerate(numbers, start=8):
            with torch.no_grad():
                logits = model(input_ids=row[None, :place].to(model.device), use_cache=False).logits[0, -1]
            probabilities = logits.double()[:256].softmax(0)
            token = int(row[place])
            below = float(probabilities[:token].sum())
            assert below - 1e-4 <= number <= below + float(probabilities[token]) + 1e-4


def test_generated_windows_depend_on_the_seed_alone():
    rows = generated()
    assert torch.equal(rows, generated())
    assert torch.equal(rows, generated(batch_size=2, sequential="block"))
    assert not torch.equal(rows[:, 8:], generated(seed=1)[:, 8:])
    assert not torch.isin(rows, torch.tensor(TOKENIZER.all_special_ids)).any()
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_a_low_temperature_is_greedy():
    model = families.model("llama").float()
    prompts = windows(calibration())[:, :8]
    rows = continue_prompts(model, prompts, torch.rand(6, 8, dtype=torch.float64), torch.arange(256), 1e-6)
    with torch.no_grad():
        greedy = model(input_ids=rows.to(model.device), use_cache=False).logits[:, 7:-1, :256].argmax(2).cpu()
    assert torch.equal(rows[:, 8:], greedy)


def test_a_model_without_a_cache_is_refused_by_name():
    config = OpenAIGPTConfig(vocab_size=families.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Refusal, match=r"^OpenAIGPTLMHeadModel keeps nothing of the tokens it has read"):
        generated(model=model)


def test_equal_windows_are_refused():
    write_news(["abcdefgh" + "x" * 8 + "abcdefgh" + "y" * 8])
    with pytest.raises(Refusal, match="only 1 of 2 generated windows are distinct; raise temperature"):
        generated(num_samples=2, sequence_length=16, temperature=1e-6)


def test_windows_longer_than_the_models_context_are_refused():
    with pytest.raises(Refusal, match=r"sequence_length 300 .* 256"):
        generated("opt", sequence_length=300)

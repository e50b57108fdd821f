"""A download's config claims exactly the ties that its files have, so every load is the same model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from stages.core.errors import Refusal
from stages.model.ties import correct_ties
from tests import families
from tests.pipeline import NONE, do, load, params, record

KEEP_ALL = {
    "source": "base/tiny", "method": "magnitude", "sparsity": 0.0, "scope": "matrix", "calibration": NONE,
}  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(16)[None]).logits


def own_head(family: str, inputs: Path, monkeypatch, *, tied: bool, claimed: bool) -> Path:
    """Write a checkpoint `own` with or without a head of its own, and a config that claims what it may."""
    config = families.CONFIGS[family]
    own = type(config)(**{**config.to_dict(), "tie_word_embeddings": tied})
    monkeypatch.setitem(families.CONFIGS, "own", own)
    monkeypatch.setitem(families.IN_FEATURES, "own", families.IN_FEATURES[family])
    folder = families.save("own", inputs / "own")
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": claimed}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_head_of_its_own_under_a_tied_config_is_kept(family, own_inputs, monkeypatch):
    folder = own_head(family, own_inputs, monkeypatch, tied=False, claimed=True)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    do(params("own", {"prune/made": KEEP_ALL}))
    for artifact in ("base/tiny", "prune/made"):
        model = load(artifact)
        assert torch.equal(logits(model), logits(expected))
        model.tie_weights()  # as lm-eval does
        assert torch.equal(logits(model), logits(expected))
        assert record(artifact)["num_parameters"] == sum(p.numel() for p in expected.parameters())
        assert len(record(artifact)["base"]["untied"]) == 1


def test_a_tied_model_stays_tied(workspace):
    do(params("llama", {"prune/made": KEEP_ALL}))
    for artifact in ("base/tiny", "prune/made"):
        model = load(artifact)
        assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
        assert "untied" not in record(artifact)["base"]


def test_an_untied_config_without_a_head_is_refused(own_inputs, monkeypatch):
    own_head("llama", own_inputs, monkeypatch, tied=True, claimed=False)
    with pytest.raises(Refusal, match=r"lacks lm_head\.weight, which its config asks for"):
        do(params("own", {}))
    assert not Path("data/models").exists()


def test_a_true_tie_under_the_setting_of_an_untrue_one_is_stored_apart(tmp_path):
    """Bert ties a bias by the same setting as the head."""
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        is_decoder=True, tie_word_embeddings=True,
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    embedding = stored["bert.embeddings.word_embeddings.weight"]
    stored["cls.predictions.decoder.weight"] = torch.randn_like(embedding)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = BertLMHeadModel.from_pretrained(tmp_path).eval()
    before = logits(model)
    assert correct_ties(model, "it").keys() == {"cls.predictions.decoder.weight"}
    model.save_pretrained(tmp_path / "copy")
    copy = BertLMHeadModel.from_pretrained(tmp_path / "copy").eval()
    copy.tie_weights()
    assert torch.equal(logits(copy), before)
    assert not copy.config.tie_word_embeddings

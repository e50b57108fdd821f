"""Names on disk and in the model: each leads back to the other, by transformers' own mapping."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    LlavaConfig,
    Qwen2AudioConfig,
    WhisperConfig,
)

from stages.core.errors import Refusal
from stages.model import names
from stages.model.artifact import check_text_model, pretrained
from stages.model.names import as_stored, check_names, naming
from stages.model.source import Empty
from tests import families
from tests.pipeline import do, params
from tests.project import sha256

DEEPSEEK = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8, "sliding_window": 16,
}  # fmt: skip
ELSEWHERE = {"gemma3_wrapper", "gpt_neox", "nemotron_h"}
"""Families whose files name some tensors otherwise than the model."""


@pytest.mark.parametrize("family", families.ALL)
def test_a_stored_name_leads_back_to_its_parameter(family, tmp_path):
    model = families.model(family)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    parameters = {name for name, _ in model.named_parameters()}
    in_model = naming(model)
    assert parameters <= {in_model(key)[0] for key in keys}
    assert not any(in_model(key)[1] for key in keys)
    assert (keys & parameters != parameters) == (family in ELSEWHERE)
    shapes = {name: parameter.detach().to("meta") for name, parameter in model.named_parameters()}
    assert as_stored(model, shapes).keys() <= keys
    check_names("m", model)


def test_a_renaming_for_another_tensor_is_passed_over(tmp_path):
    """DeepSeek-V4's files call a block's `kv_norm` `norm`, and the model's own norm has that very name."""
    config = AutoConfig.for_model("deepseek_v4", **families._GATED, **DEEPSEEK)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    check_names("m", model)
    in_model = naming(model)
    assert in_model("model.norm.weight") == ("model.norm.weight", False)
    assert in_model("model.layers.0.attn.norm.weight")[0] == "model.layers.0.self_attn.kv_norm.weight"


def test_experts_are_stored_apart():
    model = families.mixture()
    stored = as_stored(model, dict(model.named_parameters()))
    apart = [key for key in stored if naming(model)(key)[1]]
    assert len(apart) == 2 * 2 * 3
    assert {naming(model)(key)[0] for key in apart} <= {name for name, _ in model.named_parameters()}
    check_names("m", model)


@pytest.mark.parametrize("recipe", ["width", "wanda"])
def test_names_that_do_not_lead_back_are_refused_before_the_work(recipe, workspace, monkeypatch):
    chosen = params("gemma3_wrapper", {})
    do(chosen)
    stored = names.as_stored
    monkeypatch.setattr(
        names, "as_stored", lambda *args: {f"lost.{key}": value for key, value in stored(*args).items()}
    )
    with pytest.raises(Refusal, match=r"^base/tiny: .* Gemma3For\w+ under names that it does not read again"):
        Empty("base/tiny", chosen.run)


def test_a_wrapper_without_a_text_path_is_refused_as_that(workspace):
    text = families.CONFIGS["llama"].to_dict()
    config = LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model"})
    config.save_pretrained("llava")
    with pytest.raises(Refusal, match=r"^m is llava, which transformers does not load .* wraps llama: use"):
        pretrained("m", Path("llava"))
    families.save("llama", Path("own"))
    Path("own/config.json").write_text(json.dumps(config.to_dict()))
    chosen = params("llama", {})
    base = {"source": "path:own", "sha256": sha256(Path("own"))}
    chosen.models["tiny"] = chosen.models["tiny"].model_copy(update=base)
    with pytest.raises(Refusal, match="path:own is llava, which"):
        do(chosen)
    assert not Path("data/models/base/tiny").exists()


def test_an_encoder_decoder_is_refused_as_that_and_so_is_its_decoder_alone(tmp_path):
    """lm-eval would ask either as an encoder-decoder, and return the prompt as a part of each answer."""
    config = BartConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=r"^m is bart, which transformers loads as an encoder-decoder; use"):
        pretrained("m", tmp_path)
    speech = WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(Refusal, match=r"^m is whisper, which transformers loads as an encoder-decoder"):
        check_text_model("m", speech)


def test_a_model_of_speech_around_a_decoder_is_refused_as_that():
    """transformers lists it among encoder-decoders, though it writes by Qwen2."""
    with pytest.raises(Refusal, match=r"^m is qwen2_audio, a decoder of .* speech, around qwen2; use a .*"):
        check_text_model("m", Qwen2AudioConfig())
    with pytest.raises(Refusal, match=r"^m is musicgen, which transformers loads as an encoder-decoder"):
        check_text_model("m", AutoConfig.for_model("musicgen"))

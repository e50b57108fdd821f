"""A checkpoint in safetensors: what is refused before a weight is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources import tokenizer
from stages.sources.safetensors import Safetensors
from tests import families, project


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "missing.safetensors", "deep/a.safetensors", ".DS_Store"]
)
def test_an_index_that_names_files_elsewhere_is_refused(shard, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"")
    folder = tmp_path / "checkpoint"
    (folder / "deep").mkdir(parents=True)
    for file in ("a.safetensors", "deep/a.safetensors", ".DS_Store"):
        (folder / file).write_bytes(b"")
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"x": "a.safetensors", "y": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Safetensors(
        source=f"path:{folder}", format="safetensors", sha256=sha256(folder), in_features=(32,)
    )
    with pytest.raises(Refusal, match=f"names '{shard}', which is no file of its folder; put all shards"):
        source.write(tmp_path / "out", torch.bfloat16)


def written(source: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> dict:
    settings = {"source": f"path:{source}", "format": "safetensors", "sha256": sha256(source)}
    return Safetensors(**settings, in_features=(32, 64)).write(out, dtype)


@pytest.mark.parametrize(
    ("value", "dtype", "sound"),
    [
        (1e5, "float16", False), (1e5, "bfloat16", True), (1e5, "float32", True), (6e4, "float16", True),
        (float("nan"), "bfloat16", False), (float("-inf"), "float32", False),
    ],
)  # fmt: skip
def test_values_that_are_not_finite_in_the_runs_dtype_are_refused(value, dtype, sound, tmp_path):
    source = families.save("llama", tmp_path / "in")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    if sound:
        assert written(source, tmp_path / "out", getattr(torch, dtype)) == {"grid": None}
        return
    reason = rf"in {dtype}: NaN or infinite values in model\.layers\.1\.mlp\.up_proj\.weight; nothing"
    with pytest.raises(Refusal, match=reason):
        written(source, tmp_path / "out", getattr(torch, dtype))


def test_a_stored_buffer_that_is_not_finite_is_refused(tmp_path):
    """DeepSeek's correction of its router is a buffer; NaN in it sends tokens to other experts."""
    plain = {key: value for key, value in families.CONFIGS["llama"].to_dict().items() if key != "model_type"}
    config = AutoConfig.for_model(
        "deepseek_v3", **plain | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    source = tmp_path / "in"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    families.tokenizer().save_pretrained(source)
    stored = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored[name][1] = float("nan")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=f"NaN or infinite values in {name}".replace(".", r"\.")):
        written(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ([], "config.json holds a list, not settings by name"),
        ({"dtype": "float99"}, "float99"),
        ({"quantization_config": ["x"]}, "no attribute 'get'"),
    ],
)
def test_a_bad_config_is_refused_as_that(config, reason, tmp_path):
    source = families.save("llama", tmp_path / "in")
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config} if config else config))
    with pytest.raises(Refusal, match=rf"^the config of path:\S+ cannot be loaded \(.*{reason}"):
        written(source, tmp_path / "out")


def test_an_adapter_is_refused_as_one(tmp_path):
    source = families.save("llama", tmp_path / "in")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"holds an adapter .* beside the model; merge it .* or remove"):
        written(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(Refusal, match=r"is an adapter .* without its model; merge it"):
        written(source, tmp_path / "out")


def only_sentencepiece(folder: Path, **settings: bool) -> Path:
    """Write a checkpoint whose tokenizer is only a `tokenizer.model`, trained on made-up text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    source = families.save("llama", folder / "in")
    for file in [*source.glob("tokenizer*"), *source.glob("*.jinja")]:
        file.unlink()
    text = folder / "text"
    text.write_text(project.text(1))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(source / "tokenizer"), vocab_size=280, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **settings,
    )  # fmt: skip
    (source / "tokenizer.vocab").unlink()
    return source


def test_a_tokenizer_of_sentencepiece_alone_is_read_as_sentencepiece_does(tmp_path):
    source = only_sentencepiece(tmp_path)
    from sentencepiece import SentencePieceProcessor

    written(source, tmp_path / "out")
    original = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (tokenizer.SAMPLE, project.text(2)[:200].strip(), "12,000 plus 3"):
        assert ours(text, add_special_tokens=False).input_ids == original.encode(text)


def test_a_tokenizer_that_would_give_other_tokens_is_refused(tmp_path):
    source = only_sentencepiece(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(Refusal, match="as other tokens than SentencePiece does; add the model's"):
        written(source, tmp_path / "out")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    source = families.save("llama", tmp_path / "in")
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    monkeypatch.setattr(tokenizer, "PACKAGES", {"json": "json", "nothing": "no.such.package"})
    with pytest.raises(Refusal, match=r"tokenizer.model, and nothing must be installed .* pip install"):
        written(source, tmp_path / "out")


Q = "model.layers.0.self_attn.q_proj"
LEFT_OUT = {
    "a bias": {f"{Q}.bias": torch.ones(32)},
    "a scale": {f"{Q}.weight_scale": torch.ones(1)},
    "an adapter": {f"base_model.{Q}.lora_A.weight": torch.ones(2, 32)},
    "another head": {"score.weight": torch.ones(2, 32)},
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_tensors_that_the_model_would_leave_out_are_refused(case, tmp_path):
    source = families.save("llama", tmp_path / "in")
    stored = load_file(source / "model.safetensors") | LEFT_OUT[case]
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    (name,) = LEFT_OUT[case]
    with pytest.raises(Refusal, match=f"holds 1 tensors that its config has no place for.*: {name}\\."):
        written(source, tmp_path / "out")


def test_blocks_that_the_config_does_not_count_are_refused(tmp_path):
    source = families.save("llama", tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(Refusal, match=r"holds 9 tensors .*model\.layers\.1\.input_layernorm\.weight"):
        written(source, tmp_path / "out")


def test_frequencies_that_old_checkpoints_store_are_no_obstacle(tmp_path):
    source = families.save("llama", tmp_path / "in")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    assert written(source, tmp_path / "out") == {"grid": None}


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_weights_that_are_no_floats_are_refused(dtype, tmp_path):
    source = families.save("llama", tmp_path / "in")
    stored = load_file(source / "model.safetensors")
    stored[f"{Q}.weight"] = stored[f"{Q}.weight"].to(getattr(torch, dtype))
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=rf"stores 1 weights as codes .*: {Q}\.weight \("):
        written(source, tmp_path / "out")

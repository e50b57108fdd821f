"""Artifacts: sizes counted by hand, and nothing that varies from run to run."""

import json
import logging
import platform
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPTJConfig

from stages.core.errors import Refusal
from stages.core.files import sha256, writing
from stages.model.artifact import load_model
from stages.model.blocks import linears
from stages.model.checkpoint import sizes_of
from stages.pruning.magnitude import Magnitude
from tests import families
from tests.pipeline import do, load, params, prune, record
from tests.recipes import GPTQ, LORA, MAGNITUDE, RTN, WANDA, chain

pytestmark = pytest.mark.device


def counts(family: str) -> tuple[int, int]:
    """Count the weights in block linears, and all others, tied ones once."""
    model = families.model(family)
    inside = sum(linear.weight.numel() for linear in linears(model))
    return inside, sum(p.numel() for p in model.parameters()) - inside


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_dense_model_has_16_bits_a_weight(family):
    inside, rest = counts(family)
    assert sizes_of(families.model(family)) == {
        "num_parameters": inside + rest,
        "sparsity": 0.0,
        "sparsity_by_block": [0.0, 0.0],
        "bytes_ideal": 2 * (inside + rest),
        "bits_per_weight": 16.0,
    }


def test_tied_embeddings_are_counted_once():
    tied, untied = families.model("llama"), families.model("mistral")
    more = sizes_of(untied)["num_parameters"] - sizes_of(tied)["num_parameters"]
    assert more == families.VOCAB * 32


def make(*steps, family: str = "llama") -> dict:
    """Run a chain of recipes and return the last record."""
    recipes = chain(*steps)
    do(params(family, recipes), list(recipes))
    return record(list(recipes)[-1])


def test_half_sparse_linears_are_9_bits_and_the_rest_16(workspace):
    facts = make(("prune", WANDA))
    inside, rest = counts("llama")
    assert facts["sparsity"] == 0.5
    assert facts["sparsity_by_block"] == [0.5, 0.5]
    assert facts["bytes_ideal"] == (9 * inside + 16 * rest) / 8
    assert facts["bits_per_weight"] == (9 * inside + 16 * rest) / (inside + rest)
    # A sparse checkpoint is no smaller on disk.
    assert facts["bytes_on_disk"] == record("base/tiny")["bytes_on_disk"]


def test_a_little_sparsity_needs_no_bitmap(workspace):
    facts = make(("prune", WANDA | {"sparsity": 0.05}))
    assert 0 < facts["sparsity"] < 1 / 16
    assert facts["bits_per_weight"] == 16


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 32), (3, None)])
def test_quantized_linears_are_their_codes_and_scales(bits, group_size, workspace):
    facts = make(("quantize", RTN | {"bits": bits, "group_size": group_size}))
    inside, rest = counts("llama")
    zeros = facts["sparsity"] * inside
    scales = sum(
        linear.weight.shape[0] * (linear.weight.shape[1] // group_size if group_size else 1)
        for linear in linears(families.model("llama"))
    )
    ideal = -(-(bits * inside + 16 * scales + 16 * rest) // 8)
    assert facts["bytes_ideal"] == ideal or zeros / inside > 1 / bits
    assert facts["bytes_on_disk"] < record("base/tiny")["bytes_on_disk"]


def test_sparse_and_quantized_is_a_bitmap_of_codes(workspace):
    facts = make(("prune", WANDA), ("quantize", GPTQ))
    ideal = 0
    with safe_open("data/models/quantize/step-1/model.safetensors", "pt") as handle:
        names = set(handle.keys())
        packed = {name.removesuffix("_packed") for name in names if name.endswith(".weight_packed")}
        assert len(packed) == 14
    model = load("quantize/step-1")
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    for name in packed:
        weight = model.get_parameter(name)
        nonzero = int(torch.count_nonzero(weight))
        ideal += min(4 * weight.numel(), 4 * nonzero + weight.numel()) + 16 * weight.numel() // 32
    _, rest = counts("llama")
    assert facts["bytes_ideal"] == -(-(ideal + 16 * rest) // 8)
    assert facts["bits_per_weight"] < record("prune/step-0")["bits_per_weight"]


STEPS = {
    "pruned": [("prune", WANDA)],
    "quantized": [("prune", MAGNITUDE), ("quantize", GPTQ)],
    "tuned": [("prune", WANDA), ("finetune", LORA)],
    "fake_quantized": [("quantize", RTN)],
}


@pytest.mark.parametrize("steps", STEPS)
def test_nothing_in_an_artifact_varies(steps, workspace):
    make(*STEPS[steps], family="gpt2" if steps == "fake_quantized" else "llama")
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    files = [file for file in Path("data").rglob("*") if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in files)
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="replace")
        for varying in (str(workspace), "/tmp", str(Path.home()) + "/", platform.node(), today):
            assert varying not in text, f"{varying} in {file}"
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as handle:
                assert handle.metadata() == {"format": "pt"}
        if file.name == "config.json":
            assert "_name_or_path" not in json.loads(text)
    assert not [file for file in files if "scratch" in file.parts]


@pytest.mark.parametrize("steps", STEPS)
def test_two_runs_give_the_same_bytes(steps, workspace):
    read = []
    for _ in range(2):
        make(*STEPS[steps])
        read.append({f: f.read_bytes() for f in sorted(Path("data/models").rglob("*")) if f.is_file()})
    assert read[0] == read[1]


def test_an_absolute_source_is_recorded_by_its_name_alone(workspace):
    chosen = params("llama", {})
    folder = workspace / "inputs" / "llama"
    model = chosen.models["tiny"].model_copy(update={"source": f"path:{folder}"})
    model.download("tiny", chosen.run)
    assert record("base/tiny")["base"]["source"] == "path:llama"
    text = chosen.datasets["news"].model_copy(update={"source": f"path:{workspace / 'inputs'}"})
    text.download("news")
    assert json.loads(Path("data/datasets/news/dataset.json").read_text())["source"] == "path:inputs"


def test_a_record_says_what_the_numbers_depend_on(workspace):
    facts = make(("prune", WANDA))
    card = set() if families.DEVICE == "cpu" else {"kernels"}
    assert facts["numerics"].keys() == card | {
        "device", "cpu_capability", "cpu_matrix_units", "cpu_products_in_fp32", "threads", "dtype", "torch",
    }  # fmt: skip
    assert facts["base"]["sha256"] and facts["base"]["grid"] is None
    assert facts["base"]["source"] == "path:inputs/llama"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = Path("data/models/prune/x")
    with writing(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ValueError), writing(target) as folder:
        (folder / "a").write_text("new")
        raise ValueError
    assert (target / "a").read_text() == "old"
    assert not list(Path("data/scratch/partial").iterdir())


def test_a_family_without_sdpa_is_run_with_eager_attention(workspace, caplog):
    config = GPTJConfig(
        vocab_size=families.VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("gptj")
    families.tokenizer().save_pretrained("gptj")
    chosen = params("llama", {"prune/half": chain(("prune", WANDA))["prune/step-0"]})
    gptj = chosen.models["tiny"].model_copy(
        update={"source": "path:gptj", "sha256": sha256(Path("gptj")), "in_features": (32, 128)}
    )
    do(chosen.model_copy(update={"models": {"tiny": gptj}}))
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        model = load_model("prune/half", chosen.run, dequantize=True)
    assert "GPTJForCausalLM does not support torch's sdpa attention; eager attention is used" in caplog.text
    assert model.config._attn_implementation == "eager"
    assert record("prune/half")["sparsity"] == 0.5
    ids, again = torch.arange(16, device=model.device)[None], load("prune/half").to(model.device)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_mixture_is_downloaded_and_its_attention_pruned(workspace):
    """Matrices that are no linear's weight are refused by the method, not by the download, and count."""
    families.mixture().save_pretrained("mixture")
    families.tokenizer().save_pretrained("mixture")
    chosen = params("llama", {})
    base = chosen.models["tiny"].model_copy(
        update={"source": "path:mixture", "sha256": sha256(Path("mixture")), "in_features": (32,)}
    )
    chosen = chosen.model_copy(update={"models": {"tiny": base}, "prune": {}})
    base.download("tiny", chosen.run)
    options = MAGNITUDE | {"source": "base/tiny", "scope": "row"}
    chosen = chosen.model_copy(update={"prune": {"half": Magnitude.model_validate(options)}})
    with pytest.raises(Refusal, match="matrices that are no linear's weight"):
        prune(chosen, "half")
    options |= {"ignore": families.EXPERTS}
    prune(chosen.model_copy(update={"prune": {"half": Magnitude.model_validate(options)}}), "half")
    facts = record("prune/half")
    assert facts["sparsity"] == 0.5
    assert 9 < facts["bits_per_weight"] < 16

"""Exports: a folder, a GGUF file and a repository, each read back by the library it is for."""

import json
import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from flows.exporting import ship
from flows.exporting.card import model_card
from flows.exporting.ggml_file import write_gguf
from flows.exporting.ggml_vocabulary import SPLITTERS, splitter
from flows.exporting.ship import Destination, export
from stages.core.errors import Refusal
from stages.model.packed import scheme_of, weight_from
from tests import families, results
from tests.pipeline import NONE, TEXT, do, params

RTN = {"source": "base/tiny", "method": "rtn", "calibration": NONE}
RECIPES = {
    "quantize/w4": RTN | {"bits": 4, "group_size": 32},
    "quantize/w4-asymmetric": RTN | {"bits": 4, "group_size": 32, "symmetric": False},
    "quantize/w8": RTN | {"bits": 8, "group_size": None},
    "quantize/w3": RTN | {"bits": 3, "group_size": 32},
    "quantize/w4-g16": RTN | {"bits": 4, "group_size": 16},
    "prune/half": {"source": "base/tiny", "method": "wanda", "sparsity": 0.5, "calibration": TEXT},
}
FAMILIES = ("llama", "mistral", "qwen3")


def weights(artifact):
    """All parameters of an artifact, dequantized."""
    folder = Path("data/models", artifact)
    scheme = scheme_of(AutoConfig.from_pretrained(folder))
    stored = load_file(folder / "model.safetensors")
    names = {re.sub(r"(?<=\.weight)_(packed|scale|shape|zero_point)$", "", name) for name in stored}
    return {name: weight_from(stored, name, scheme) for name in names}


@pytest.fixture(params=FAMILIES)
def family(request, workspace):
    do(params(request.param, RECIPES))
    return request.param


@pytest.mark.parametrize(
    "artifact",
    ["base/tiny", "prune/half", "quantize/w3", "quantize/w4", "quantize/w4-asymmetric", "quantize/w8"],
)
def test_a_gguf_file_holds_every_weight(family, artifact):
    (sentence, *more) = export(artifact, Destination.gguf, "out", None)
    said = {"quantize/w4-asymmetric": "Zero points became minimums", "quantize/w3": "such codes take 4 bits"}
    assert len(more) == (artifact in said) and all(said[artifact] in sentence for sentence in more)
    (file,) = Path("out").glob("*.gguf")
    # transformers reads no size of heads for Qwen3
    options = {"config": families.CONFIGS[family]} if family == "qwen3" else {}
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        "out", gguf_file=file.name, dtype=torch.float32, quantization_config=dense, **options
    )
    due = weights(artifact)
    read = model.state_dict()
    due.setdefault("lm_head.weight", due["model.embed_tokens.weight"])
    assert read.keys() == due.keys()
    for name, tensor in due.items():
        if artifact == "quantize/w4-asymmetric":
            torch.testing.assert_close(read[name], tensor.float(), rtol=2**-7, atol=2e-3)
        else:  # the artifact is in bf16, in which its codes times scales are rounded
            assert torch.equal(read[name].to(torch.bfloat16), tensor.to(torch.bfloat16)), name
    names = {
        tensor.tensor_type.name for tensor in GGUFReader(file).tensors if tensor.tensor_type.name[0] == "Q"
    }
    assert names == {
        "quantize/w3": {"Q4_0"},
        "quantize/w4": {"Q4_0"},
        "quantize/w4-asymmetric": {"Q4_1"},
        "quantize/w8": {"Q8_0"},
    }.get(artifact, set())
    assert ("Q4_0" in sentence) == (artifact in ("quantize/w3", "quantize/w4"))


def test_the_stored_codes_are_the_artifacts(workspace):
    do(params("qwen3", RECIPES))
    export("quantize/w4", Destination.gguf, "out", None)
    with safe_open("data/models/quantize/w4/model.safetensors", "pt") as stored:
        name = "model.layers.1.mlp.down_proj.weight"
        words, scale = stored.get_tensor(f"{name}_packed"), stored.get_tensor(f"{name}_scale")
    codes = torch.stack([(words >> 4 * place & 15) - 8 for place in range(8)], dim=-1).flatten(1)
    due = codes.float() * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    (tensor,) = (t for t in GGUFReader("out/w4.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    assert torch.equal(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)), due)


def test_the_tokenizer_reads_the_same_ids(tmp_path):
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    text = "Prices rose 12.5 % in 1999,\n\tthey said - naïve prices, prices they said rose?"
    learned.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "out").mkdir()
    write_gguf("m", tmp_path, tmp_path / "out/m.gguf")
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="m.gguf")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert read(text, add_special_tokens=False).input_ids == ids
    assert len(ids) < len(text)  # merges are used
    assert (read.chat_template, read.bos_token, read.eos_token) == (tokenizer.chat_template, "<s>", "</s>")
    fields = GGUFReader(tmp_path / "out/m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    types = fields["tokenizer.ggml.token_type"].contents()
    kinds = [TokenType(kind) for kind in types]
    assert kinds[:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    assert kinds[len(tokenizer) :] == [TokenType.UNUSED] * (320 - len(tokenizer))


@pytest.mark.parametrize(
    ("family", "artifact", "words"),
    [
        ("llama", "quantize/w4-g16", "groups of 16 columns do not split into blocks of 32.*and 10 more"),
        ("gpt_neox", "base/tiny", "is gpt_neox, but only llama, mistral, qwen2, qwen3 are written to GGUF"),
        ("llama", "quantize/none", "no artifact quantize/none"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(workspace, family, artifact, words):
    do(params(family, RECIPES if family == "llama" else {}))
    before = sorted(Path().iterdir())
    with pytest.raises(Refusal, match=words):
        export(artifact, Destination.gguf, "out", None)
    assert sorted(Path().iterdir()) == before


def test_nothing_is_overwritten(workspace):
    do(params("llama", {}))
    Path("out").mkdir()
    with pytest.raises(Refusal, match="out exists; name another folder"):
        export("base/tiny", Destination.hf, "out", None)
    assert not any(Path("out").iterdir())


def test_a_folder_loads_and_its_card_says_what_it_is(workspace):
    do(params("llama", RECIPES))
    export("quantize/w4", Destination.hf, "out/mine", "apache-2.0")
    model = AutoModelForCausalLM.from_pretrained("out/mine")
    assert "pack-quantized" in str(model.config.quantization_config)
    card = Path("out/mine/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    record = json.loads(Path("data/models/quantize/w4/artifact.json").read_text())
    for words in (
        record["base"]["source"], '"group_size": 32', "prunequant run quantize/w4", "compressed-tensors",
        f"{record['num_parameters']:,} parameters", "is not of this artifact",
    ):  # fmt: skip
        assert words in card
    assert not any(file.is_symlink() for file in Path("out/mine").iterdir())


def test_an_ollama_folder_names_its_file(workspace):
    do(params("llama", {}))
    export("base/tiny", Destination.ollama, "out", None)
    assert Path("out/Modelfile").read_text() == "FROM ./tiny.gguf\n"
    assert "ollama create tiny -f Modelfile" in Path("out/README.md").read_text()
    card, size = Path("out/README.md").read_text(), Path("out/tiny.gguf").stat().st_size
    assert "library_name: gguf\n" in card and f" {size / 1e6:,.1f} MB on disk" in card


def test_known_splitters_are_those_of_their_tokenizers():
    assert set(SPLITTERS.values()) == {"gpt-2", "smollm", "llama-bpe", "qwen2"}
    qwen = {
        "model": {"type": "BPE", "byte_fallback": False},
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": (
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                )}},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
    }  # fmt: skip
    assert splitter(qwen, "q") == "qwen2"
    qwen["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    with pytest.raises(Refusal, match=r"q: its tokenizer splits text by .* no name of llama.cpp is known"):
        splitter(qwen, "q")
    with pytest.raises(Refusal, match="SentencePiece, but only byte-level BPE"):
        splitter({"model": {"type": "BPE", "byte_fallback": True}}, "g")


@pytest.fixture
def hub(monkeypatch):
    """A local hub that takes new repositories; yields what it holds, by repository."""
    held = {"org/there": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            self._send(200 if name in held else 404, {"id": name, "_id": "0", "siblings": []})

        def do_POST(self):
            assert self.headers["authorization"] == "Bearer hf_secret"
            size = self.headers.get("Content-Length")
            body = self.rfile.read(int(size)) if size else self._chunks()
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                held[f"{asked['organization']}/{asked['name']}"] = {}
                self._send(200, {"url": f"{address}/{asked['organization']}/{asked['name']}"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._send(200, {"files": files})
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        held[name][entry["value"]["path"]] = entry["value"]["content"]
                answer = {"commitUrl": f"{address}/{name}/commit/0", "commitOid": "0" * 40, "success": True}
                self._send(200, answer)
            else:
                self._send(200, {})

        def _chunks(self):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, status, answer):
            body = json.dumps(answer).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield held
    server.shutdown()
    server.server_close()


def test_a_repository_is_filled_once(workspace, hub):
    do(params("llama", RECIPES))
    (sentence,) = export("quantize/w4", Destination.hub, "org/new", None)
    assert "org/new" in sentence and "hf_secret" not in sentence
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "artifact.json"} <= hub[
        "org/new"
    ].keys()
    held = dict(hub["org/new"])
    with pytest.raises(Refusal, match=r"org/new exists on .* and is not overwritten"):
        export("quantize/w4", Destination.hub, "org/new", None)
    assert hub["org/new"] == held
    assert not any(path.name.startswith(("export", ".export")) for path in Path("data/scratch").glob("*"))


def test_a_hub_needs_a_token_and_a_repository(workspace, monkeypatch):
    do(params("llama", {}))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(Refusal, match=r"needs a token .* HF_TOKEN"):
        export("base/tiny", Destination.hub, "org/new", None)
    with pytest.raises(Refusal, match="--output org/name"):
        export("base/tiny", Destination.hub, None, None)
    assert "HF_TOKEN" not in os.environ


def test_a_card_has_the_scores_of_the_last_report_beside_their_reference(workspace):
    do(params("llama", RECIPES))
    record = json.loads(Path("data/models/quantize/w4/artifact.json").read_text())
    row = {
        "suite": "news", "label": "perplexity", "metric": "perplexity", "value": 31.5, "low": 29.0,
        "high": 34.0, "reference": "base/tiny", "of_reference": 1.05, "floor": None, "noise": 0.25,
        "word": "slightly worse",
    }  # fmt: skip
    card = model_card(record, [row], "", None, "abc")
    assert (
        "| news: perplexity | 31.50 | 29.00 to 34.00 | base/tiny | 105.0% | – | 0.25 | slightly worse |"
        in card
    )
    assert "git checkout abc\n" in card and "git checkout" not in model_card(record, [], "", None, None)


@pytest.mark.parametrize(("scored", "given"), [("now", True), ("before", False)])
def test_scores_are_those_of_the_artifact_whatever_else_the_lock_remembers(scored, given, monkeypatch):
    path = "data/models/prune/wanda-50"
    entries = {
        "prune@wanda-50": {"outs": [{"path": path, "md5": "now"}]},
        "perplexity@prune/wanda-50-news": {"deps": [{"path": path, "md5": scored}]},
        # A measurement that params.yaml no longer names.
        "profile@prune/wanda-50": {"deps": [{"path": path, "md5": "older"}]},
    }
    rows = [{"candidate": "prune/wanda-50"}, {"candidate": "base/smollm2"}]
    monkeypatch.setattr(ship, "summarized", lambda: rows)
    monkeypatch.setattr(ship, "edited", lambda params, artifact: False)
    monkeypatch.setattr(ship, "load", lambda device: results.params())
    monkeypatch.setattr(ship, "locked_stages", lambda: entries)
    assert ship._scores("prune/wanda-50") == (rows[:1] if given else [])


def test_a_published_checkpoint_is_not_exported(workspace):
    do(params("llama", {}))
    file = Path("data/models/base/tiny/artifact.json")
    record = json.loads(file.read_text())
    record["base"] |= {"format": "packed", "source": "hub:org/theirs@0"}
    file.write_text(json.dumps(record))
    with pytest.raises(Refusal, match=r"published checkpoint, .* did not make; share its source"):
        export("base/tiny", Destination.hf, "out", None)

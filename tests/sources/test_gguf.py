"""GGUF: the grids of a file's weights are counted, and a model in one becomes a checkpoint."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.core.files import sha256
from stages.sources import ggml
from stages.sources.ggml import count_grids, dequantized_gguf
from stages.sources.gguf import Gguf
from tests.ggufs import write_model


def written(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]) -> Path:
    """Write a GGUF file with these tensors and types."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (values, kind) in tensors.items():
        writer.add_tensor(
            name, values if kind is None else gguf.quants.quantize(values, kind), raw_dtype=kind
        )
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def test_the_grids_of_a_file_are_counted(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    kinds = gguf.GGMLQuantizationType
    tensors = {"a": (values, kinds.Q4_1), "b": (values, kinds.Q4_1), "c": (values, kinds.Q8_0)}
    file = written(tmp_path / "m.gguf", tensors | {"norm": (np.ones(64, dtype=np.float32), None)})
    assert count_grids(file) == {
        "format": "Q4_1",
        "group_size": 32,
        "tensors": {"F32": 1, "Q4_1": 2, "Q8_0": 1},
        "weights": {"F32": 64, "Q4_1": 512, "Q8_0": 256},
    }


def test_a_file_of_floats_has_no_grid(tmp_path):
    floats = {"a": (np.ones((2, 32), dtype=np.float16), None)}
    assert count_grids(written(tmp_path / "m.gguf", floats)) is None


def test_parts_come_from_packages():
    settings = {
        "format": "gguf",
        "source": "pypi:a==1",
        "file": "a",
        "sha256": "0" * 64,
        "in_features": (32,),
    }
    part = {"source": "pypi:b==1", "file": "b"}
    assert Gguf(**settings, parts=(part,)).parts[0].file == "b"
    for wrong in ({"source": "path:inputs"}, {"parts": ({**part, "source": "path:inputs"},)}):
        with pytest.raises(ValidationError, match="path:inputs is none; give one file instead"):
            Gguf(**settings | {"parts": (part,)} | wrong)


def converted(path: Path, splitter: str) -> Any:
    """A written checkpoint's tokenizer, from a file with this name for how text is split."""
    write_model(path / "m.gguf", splitter=splitter)
    folder = path / "written"
    folder.mkdir()
    facts = dequantized_gguf(path / "m.gguf", "m", folder, torch.float32)
    assert facts["splitter"] == splitter
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("splitter", "expected"),
    [
        ("gpt-2", ["ab", "Ġ", "Ġ1234"]), ("smollm", ["ab", "ĠĠ", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", "Ġ", "Ġ", "123", "4"]), ("qwen2", ["ab", "Ġ", "Ġ", "1", "2", "3", "4"]),
    ],
)  # fmt: skip
def test_text_is_split_by_the_rule_that_a_file_names(splitter, expected, tmp_path):
    pieces = converted(tmp_path, splitter).backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab  1234")
    assert [piece for piece, _ in pieces] == expected


def test_a_rule_without_a_known_expression_is_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(ggml.log, "warning", lambda text, *words: said.append(text % words))
    converted(tmp_path, "of-next-year")
    assert len(said) == 1 and "m splits text by the rule of-next-year, which is not known here" in said[0]


def test_a_model_in_a_file_becomes_a_checkpoint(tmp_path):
    tensors = write_model(tmp_path / "m.gguf")
    base = Gguf(
        source=f"path:{tmp_path}", format="gguf", file="m.gguf", sha256=sha256(tmp_path / "m.gguf"),
        in_features=(32, 64),
    )  # fmt: skip
    folder = tmp_path / "written"
    folder.mkdir()
    assert base.write(folder, torch.float32)["grid"] is None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("abcd", add_special_tokens=False) == [6, 7]
    down = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(down, torch.from_numpy(tensors["blk.0.ffn_down"]).float())

"""GGUF files: their weights as a plain checkpoint, and the grids that these lie on.

A file names the rule by which llama.cpp splits text before it merges bytes (`tokenizer.ggml.pre`).
transformers knows the regular expressions of many names, but takes GPT-2's for those that first split digits,
such as SmolLM's, and in silence for names that it does not know.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.reading import reading
from stages.model.artifact import pretrained
from stages.sources.base import write_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_GROUP_SIZES = {
    "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "Q2_K": 16, "Q3_K": 16, "Q6_K": 16,
}  # fmt: skip
_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Names under which llama.cpp makes each digit a token of its own, then splits as GPT-2 does."""
_GPT2 = {"gpt-2", "phi-2", "olmo", "mellum", "gigachat", "jina-es", "jina-de", "a.x-4.0"}
_FLOAT_TYPES = ("F16", "F32", "BF16")


def dequantized_gguf(path: Path, source: str, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write config, tokenizer and `dtype` safetensors into `folder`; return facts for the record.

    Args:
        path: the GGUF file.
        source: its name in a refusal.

    Raises:
        Refusal: it is no file, cannot be read, or is no causal language model.
    """
    from transformers import AutoTokenizer, GgufConfig

    if path.is_dir():
        raise Refusal(f"{source} is a folder; name the .gguf file in it.")
    # The conversion logs its whole map of tensors; the progress bar is enough.
    logging.getLogger("gguf").setLevel(logging.WARNING)
    with reading(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    name = split_as_named(tokenizer, path, source)
    tokenizer.save_pretrained(folder)
    model = pretrained(
        source, path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    return {"grid": count_grids(path), "splitter": name, **write_checkpoint(model, source, folder)}


def split_as_named(tokenizer: PreTrainedTokenizerBase, path: Path, source: str) -> str | None:
    """Let a byte-level tokenizer split text by the rule that its GGUF file names; return the name.

    A name that neither transformers nor this file knows is told in a warning. Return None where tokens are no
    merged bytes, or the file names no rule.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fields = GGUFReader(path).fields
    kind, name = (
        fields[key].contents() if (key := f"tokenizer.ggml.{each}") in fields else None
        for each in ("model", "pre")
    )
    if kind != "gpt2" or name is None:
        return None
    if name in _DIGITS:
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    elif name not in _GPT2 and name not in GGUF_PRE_TOKENIZER_SPLITS:
        log.warning(
            "%s splits text by the rule %s, which is not known here; it is split as GPT-2 does, and its "
            "tokens can differ from llama.cpp's: use the model's safetensors if there are any.", source, name,
        )  # fmt: skip
    return str(name)


def count_grids(path: Path) -> dict[str, Any] | None:
    """Return the numbers of tensors and weights of each type in a GGUF file, and the type of most weights.

    None when every tensor is a float.
    """
    from gguf import GGUFReader

    tensors, weights = Counter[str](), Counter[str]()
    for tensor in GGUFReader(path).tensors:
        tensors[tensor.tensor_type.name] += 1
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    quantized = {name: count for name, count in weights.items() if name not in _FLOAT_TYPES}
    if not quantized:
        return None
    main = max(quantized, key=lambda name: quantized[name])
    return {
        "format": main,
        "group_size": _GROUP_SIZES.get(main),
        "tensors": dict(sorted(tensors.items())),
        "weights": dict(sorted(weights.items())),
    }

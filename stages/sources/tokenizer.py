"""The tokenizer of a downloaded checkpoint, also where it is only SentencePiece's `tokenizer.model`.

transformers converts a `tokenizer.model` to its own format. The tokens that come out depend on the class that
the checkpoint names, or does not name. So the result is compared with SentencePiece itself on a sample: with
other tokens it would be another model.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.errors import Refusal
from stages.core.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""The packages that read a `tokenizer.model`, and a module of each."""
SAMPLE = "The river froze in 1963, and nobody crossed it until spring. Why? It's a long story (see page 12)."


def original_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the checkpoint in `folder`.

    Raises:
        Refusal: it cannot be read, a package is missing, or its tokens would not be SentencePiece's.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        with reading(f"the tokenizer of {source}"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if missing := [name for name, module in PACKAGES.items() if not _installed(module)]:
        raise Refusal(
            f"{source} has its tokenizer only as tokenizer.model, and {' and '.join(missing)} must be "
            f"installed to read it; run pip install {' '.join(missing)}, or add the model's tokenizer.json."
        )
    from sentencepiece import SentencePieceProcessor

    with reading(f"the tokenizer of {source}"):
        expected = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(SAMPLE)
        # A checkpoint that names no class is most likely Llama's.
        for load in (AutoTokenizer.from_pretrained, LlamaTokenizer.from_pretrained):
            tokenizer: PreTrainedTokenizerBase = load(folder, trust_remote_code=False)
            if tokenizer(SAMPLE, add_special_tokens=False).input_ids == expected:
                return tokenizer
    raise Refusal(
        f"{source}: transformers reads its tokenizer.model as other tokens than SentencePiece does; add the "
        "model's tokenizer.json, or the tokenizer_config.json that names its tokenizer_class."
    )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False

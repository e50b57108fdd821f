"""A tokenizer in the fields of GGUF.

llama.cpp splits text by rules of its own, chosen by the name in `tokenizer.ggml.pre`, then merges bytes as
tokenizer.json says. Only tokenizers whose splitting is known under such a name are written, because with
another one llama.cpp would read other tokens in silence. The table's names are llama.cpp's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from gguf.vocab import SpecialVocab

from stages.core.errors import Refusal
from stages.core.reading import reading

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS, _SPLIT, _LEVEL = ("Digits", True), "Split", ("ByteLevel", False)
SPLITTERS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (_DIGITS, ("ByteLevel", True)): "smollm",
    ((_SPLIT, _LLAMA3), _LEVEL): "llama-bpe",
    ((_SPLIT, _QWEN2), _LEVEL): "qwen2",
}
"""llama.cpp's name of each sequence of steps that split text before bytes are merged."""


def splitter(tokenizer: dict[str, Any], label: str) -> str:
    """Return llama.cpp's name for how a tokenizer.json splits text.

    Raises:
        Refusal: llama.cpp has no name for it that is known here, or the tokens are no merged bytes.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model["type"]
        raise Refusal(
            f"{label}: its tokenizer is {kind}, but "
            "only byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) is written to GGUF; use --to hf and "
            "llama.cpp's own converter."
        )
    step = tokenizer["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    known = tuple(_key(each) for each in steps)
    if known not in SPLITTERS or tokenizer.get("normalizer") not in (None, {"type": "NFC"}):
        raise Refusal(
            f"{label}: its tokenizer splits text by {json.dumps(steps)}, for which no name of llama.cpp is "
            f"known here (known are {', '.join(SPLITTERS.values())}); use --to hf and "
            "llama.cpp's own converter."
        )
    return SPLITTERS[known]


def _key(step: dict[str, Any]) -> tuple[Any, ...]:
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "ByteLevel", step.get("use_regex", True)
        case "Digits":
            return "Digits", step["individual_digits"]
        case "Split" if step["behavior"] == "Isolated" and not step["invert"]:
            return _SPLIT, step["pattern"].get("Regex")
    return (json.dumps(step),)


def write_vocabulary(writer: GGUFWriter, folder: Path, rows: int, label: str) -> None:
    """Add tokens, their types, merges, special tokens and the chat template of a checkpoint's folder.

    Args:
        rows: of the embedding; ids that the tokenizer lacks are filled with unused tokens.

    Raises:
        Refusal: the tokenizer cannot be written, or has more tokens than the embedding has rows.
    """
    with reading(f"the tokenizer of {label}"):
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pre = splitter(tokenizer, label)
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    words |= {index: token["content"] for index, token in added.items()}
    if max(words) >= rows:
        raise Refusal(
            f"{label}: its tokenizer has ids up to {max(words)}, but its embedding {rows} rows. "
            "Restore its files."
        )
    kinds = []
    for index in range(rows):
        if index in added:
            kinds.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL if index in words else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    # llama.cpp would add a token that the tokenizer does not.
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)

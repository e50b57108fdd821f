"""Tokenizers that differ in what they put before a text, and in nothing else."""

from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests import families

BOS = families.CONFIGS["llama"].bos_token_id
KINDS: dict[str, tuple[str, list[int], list[int]]] = {
    "none": ("$A", [], [BOS]),
    "bos": ("<bos> $A", [BOS], [BOS]),
    "both ends": ("<bos> $A <eos>", [BOS], [BOS]),
    "end only": ("$A <eos>", [], [BOS]),
    "two tokens": ("<pad> <bos> $A", [BOS + 2, BOS], [BOS + 2, BOS]),
}
"""What a tokenizer makes of a text, the rows' beginning with `bos: auto`, and that with `bos: true`."""


def tokenizer(kind: str, **options: Any) -> PreTrainedTokenizerFast:
    """Make the byte tokenizer of `families` put before and after a text what its kind says."""
    made = families.tokenizer()
    pieces, _, _ = KINDS[kind]
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>", "<pad>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=special
    )
    for name, value in options.items():
        setattr(made, name, value)
    return made

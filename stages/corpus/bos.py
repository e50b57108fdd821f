"""BOS, the token that begins a text: put before rows of tokens where a model expects it.

Some models have never read a text without BOS, and fail on one: on the same text Gemma-3-270M has
perplexity 53 without and 19 with it. Others, such as SmolLM2, have never read it. The tokenizer tells: it
puts BOS before a text, or it does not. `auto` does the same for every row: a window, a question with its
answer, a prompt. BOS is read, and never predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from stages.core.errors import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", True, False]
"""Whether rows begin with BOS; `auto` if the tokenizer puts it before a text by itself."""


def bos_tokens(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[int]:
    """Return the tokens to put before a row: BOS, or none.

    They are whatever the tokenizer puts before a text, which in a few families is more than one token.

    Raises:
        Refusal: `bos` is true, and the tokenizer has no BOS.
    """
    if bos == "auto":
        return _own(tokenizer)
    if not bos:
        return []
    if not (tokens := _known(tokenizer)):
        raise Refusal(
            "bos is true, but the model's tokenizer has no BOS token; set bos to auto or false, or give the "
            "tokenizer a bos_token."
        )
    return tokens


def begin(row: list[int], tokens: list[int]) -> list[int]:
    """Return `row` after the tokens of `bos_tokens`, unless it has them: a chat template may write BOS."""
    return row if row[: len(tokens)] == tokens else tokens + row


def begun(rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether every row begins with BOS."""
    tokens = _known(tokenizer)
    return bool(tokens) and all(list(row[: len(tokens)]) == tokens for row in rows)


def closes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer puts tokens after a text, such as EOS, which no prompt may end with."""
    whole, text = (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    return len(whole) > len(_own(tokenizer)) + len(text)


def _own(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    whole, text = (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    start = next((at for at in range(len(whole)) if whole[at : at + len(text)] == text), 0)
    return list(whole[:start])


def _known(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokenizer's beginning of a text, whether it puts it there by itself or not."""
    token = tokenizer.bos_token_id
    return _own(tokenizer) or ([] if token is None else [int(token)])

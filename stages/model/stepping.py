"""Reading on from what a model keeps of earlier tokens: keys and values, or the state of a recurrence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_KEPT = ("past_key_values", "cache_params", "state")
"""The names that transformers gives to it, in the outputs and the arguments of models."""


def read_on(model: PreTrainedModel, ids: Tensor, kept: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Read `ids` `[rows, tokens]`; return logits `[rows, vocabulary]` after the last, and what is kept then.

    Args:
        kept: what was returned for the tokens before; empty at first. It is changed.

    Raises:
        Refusal: the model keeps nothing.
    """
    out: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1, **kept)
    kept = {name: out[name] for name in _KEPT if out.get(name) is not None}
    if not kept:
        raise Refusal(
            f"{type(model).__name__} keeps nothing of the tokens it has read, so it is too slow to generate; "
            "set tokens: text, or take it out of profile.candidates."
        )
    return out.logits[:, -1], kept

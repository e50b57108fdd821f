"""Positions: how many tokens a model reads, and where its rotary frequencies change with the longest row.

LongRoPE (Phi-3) has a set of frequencies for texts up to a length, and another for longer ones. A forward
takes one set, by its longest row, for all rows and all of their tokens. So rows on both sides of that length
must not share a forward, and keys that were kept of the tokens before it are wrong after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NAMES = ("max_position_embeddings", "max_seq_len")
"""The names under which configs tell the tokens that their model reads; the second is MPT's, whose biases end
there."""


def most_tokens(config: Any) -> int | None:
    """Return the tokens that a model of this config reads at most; None is no bound (-1 in XLNet's)."""
    text = config.get_text_config()
    return _first(getattr(text, name, None) for name in _NAMES)


def most_tokens_of(settings: Mapping[str, Any]) -> int | None:
    """Return the same of the settings of a config.json, which may have a family's own name."""
    text = settings.get("text_config", settings)
    return _first(text.get(name) for name in (*_NAMES, "n_positions"))


def _first(limits: Iterable[Any]) -> int | None:
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def switch_lengths(config: Any) -> tuple[int, ...]:
    """Return the lengths of text above which rotary frequencies are others; empty for most models."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]  # some have one by layer
    longs = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return tuple(sorted({kind["original_max_position_embeddings"] for kind in longs}))


def sharing(config: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Return the places of the rows that may share a forward, padded at their ends: mostly all of them.

    Args:
        lengths: tokens of each row.
    """
    limits = switch_lengths(config)
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(sum(length > limit for limit in limits), []).append(place)
    return list(groups.values())

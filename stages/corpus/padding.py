"""Prompts of unequal length in one batch: where padding changes no answer, and batches without it elsewhere.

`generate` of transformers pads short prompts on the left and masks the padding. An answer is then that of the
prompt alone only if each token's position is counted by the mask, and nothing but masked attention carries
text from token to token. The state of a recurrent model (RecurrentGemma) reads its padding too, or depends on
where blocks of tokens begin. So only models that keep nothing but keys and values are padded. All others get
batches of equal lengths, or one prompt at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

Batching = Literal["padded", "equal lengths", "one prompt"]
"""The prompts that may share a forward of `generate`."""
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers of a cache that hold keys and values alone; the last holds none, as its block reuses another's."""


def batching(model: PreTrainedModel) -> Batching:
    """Return which prompts may share a forward, by what the model keeps of the tokens it has read.

    Only keys and values allow padding; they can also be cut, and repeated by rows. Another cache of
    transformers allows equal lengths. A model that keeps something else (RWKV), or nothing, gets one prompt.
    """
    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    cache = out.get("past_key_values", out.get("cache_params"))
    # MiniMax, for example, adds the state of its linear attention to a cache of its own.
    plain = type(cache) is DynamicCache and all(type(layer) in _KEYS_AND_VALUES for layer in cache.layers)
    if plain and "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        return "padded"
    return "equal lengths" if isinstance(cache, Cache) else "one prompt"


def counts_by_mask(model: PreTrainedModel) -> bool:
    """Tell whether padding may even follow a cached prefix, if no row outgrows a window of its layers.

    Positions must be given to the model, counted by the mask: biases like those of MPT count places. Its
    masks must be made by transformers for all models alike, so that windows are those of the cache: GPT-Neo
    has its own.
    """
    given = "position_ids" in inspect.signature(type(model).forward).parameters
    return given and bool(model._supports_attention_backend)


def generate_rows(
    ids: Tensor,
    mask: Tensor,
    filler: int,
    allowed: Batching,
    generate: Callable[[Tensor, Tensor, list[int]], Tensor],
) -> Tensor:
    """Return what `generate` returns, called for as many rows at once as may share a forward.

    Args:
        ids: prompts `[rows, tokens]`, padded on the left.
        mask: `[rows, tokens]`, 0 for padding.
        filler: the token that fills up rows that end before others.
        allowed: the prompts that may share a forward.
        generate: takes prompts, their mask, and their places among the rows; returns the prompts and the
            tokens after them.
    """
    pads = (ids.shape[1] - mask.sum(1)).tolist()
    if allowed == "padded":
        return generate(ids, mask, list(range(len(ids))))
    groups: dict[object, list[int]] = {}
    for place, pad in enumerate(pads):
        groups.setdefault(pad if allowed == "equal lengths" else place, []).append(place)
    rows: list[Tensor] = [ids[:0]] * len(ids)
    for places in groups.values():
        pad = pads[places[0]]
        out = generate(ids[places, pad:], mask[places, pad:], places)
        for place, row in zip(places, torch.cat([ids[places, :pad], out], 1), strict=True):
            rows[place] = row
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

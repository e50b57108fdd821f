"""Prompts of unequal length in one batch: where padding changes no answer, and batches without it elsewhere.

`generate` of transformers pads short prompts on the left and masks the padding. An answer is then that of the
prompt alone only if each token's position is counted by the mask, and nothing but masked attention carries
text from token to token. Attention between keys and values in a cache does that; the state of a recurrent
model (Mamba) or of a convolution reads its padding too, in some families, or depends on where it is cut. So
only models that keep nothing but keys and values are padded. All others get prompts of equal lengths.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers of a cache that hold keys and values alone; the last holds none, as its block reuses another's."""


def keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Tell whether all that the model keeps of the tokens it has read is keys and values, a layer each.

    A cache of these can be cut and repeated by rows.
    """
    if not {"past_key_values", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
        return False
    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    layers = getattr(getattr(out, "past_key_values", None), "layers", [])
    return bool(layers) and all(type(layer) in _KEYS_AND_VALUES for layer in layers)


def counts_by_mask(model: PreTrainedModel) -> bool:
    """Tell whether padding may even follow a cached prefix, if no row outgrows a window of its layers.

    Positions must be given to the model, counted by the mask: biases like those of MPT count places. Its
    masks must be made by transformers for all models alike, so that windows are those of the cache: GPT-Neo
    has its own.
    """
    given = "position_ids" in inspect.signature(model.forward).parameters
    return given and bool(model._supports_attention_backend)


def generate_rows(
    ids: Tensor,
    mask: Tensor,
    filler: int,
    padded: bool,
    generate: Callable[[Tensor, Tensor, list[int]], Tensor],
) -> Tensor:
    """Return what `generate` returns, called once or, where padding is not allowed, once a length.

    Args:
        ids: prompts `[rows, tokens]`, padded on the left.
        mask: `[rows, tokens]`, 0 for padding.
        filler: the token that fills up rows that end before others.
        padded: whether padding is allowed.
        generate: takes prompts, their mask, and their places among the rows; returns the prompts and the
            tokens after them.
    """
    pads = (ids.shape[1] - mask.sum(1)).tolist()
    if padded or not any(pads):
        return generate(ids, mask, list(range(len(ids))))
    rows: list[Tensor] = [ids[:0]] * len(ids)
    for pad in sorted(set(pads)):
        places = [place for place, other in enumerate(pads) if other == pad]
        out = generate(ids[places, pad:], mask[places, pad:], places)
        for place, row in zip(places, torch.cat([ids[places, :pad], out], 1), strict=True):
            rows[place] = row
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

"""Prompts of unequal length in one batch: where padding changes no answer, and batches without it elsewhere.

`generate` of transformers pads short prompts on the left and masks the padding. An answer is then that of the
prompt alone only if each token's position is counted by the mask, and nothing but masked attention carries
text from token to token. The state of a recurrent model (RecurrentGemma) reads its padding too, or depends on
where blocks of tokens begin; GIT counts padding as positions. So only models that keep nothing but keys and
values are padded, and only if a trial on a few tokens shows that padding changes nothing. All others get
batches of equal lengths, or one prompt at a time. So do models whose rotary frequencies depend on the longest
row (LongRoPE of Phi-3): a longer row changes the others, which a short trial does not show. (Those of dynamic
NTK change only beyond the positions of the config, where no prompt goes.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from stages.core.lazy import mock
from stages.model.causal import logit_size, probe_tokens
from stages.model.positions import switch_lengths

Batching = Literal["padded", "equal lengths", "one prompt"]
"""The prompts that may share a forward of `generate`."""
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers of a cache that hold keys and values alone; the last holds none, as its block reuses another's."""
_KNOWN: WeakKeyDictionary[PreTrainedModel, Batching] = WeakKeyDictionary()
_TRIED, _STEPS = 24, 3
"""Tokens of a row that a model is tried out on, and how many of them are generated."""
_ROUGHLY = 0.3
"""How far logits may be apart where inputs are rounded to few bits, as one code changes those that follow."""


def batching(model: PreTrainedModel) -> Batching:
    """Return which prompts may share a forward, by what the model keeps of the tokens it has read.

    Only keys and values allow padding; they can also be cut, and repeated by rows. Another cache of
    transformers allows equal lengths. A model that keeps something else (RWKV), or nothing, gets one prompt.
    A model is tried out once, on about 24 tokens, whatever weights it gets later.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _batching(model)
    return _KNOWN[model]


def batches_well(model: PreTrainedModel) -> bool:
    """Tell whether prompts of equal length may share a forward: with LongRoPE they may, in RWKV not."""
    return batching(model) != "one prompt" or bool(switch_lengths(model.config))


@torch.no_grad()
def _batching(model: PreTrainedModel) -> Batching:
    if switch_lengths(model.config):
        return "one prompt"
    out = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    cache = out.get("past_key_values", out.get("cache_params"))
    # MiniMax, for example, adds the state of its linear attention to a cache of its own.
    plain = type(cache) is DynamicCache and all(type(layer) in _KEYS_AND_VALUES for layer in cache.layers)
    plain = plain and "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if plain and _continues(model) and _pads(model):
        return "padded"
    return "equal lengths" if isinstance(cache, Cache) else "one prompt"


def _continues(model: PreTrainedModel) -> bool:
    """Tell whether tokens after a cached prefix get the logits that they get in one forward."""
    row = probe_tokens(model, _TRIED)[:1]
    whole = model(input_ids=row, use_cache=False).logits
    prefix = model(input_ids=row[:, :-4], use_cache=True, logits_to_keep=1).past_key_values
    rest = model(input_ids=row[:, -4:], past_key_values=prefix, use_cache=True).logits
    return _equal(model, rest, whole[:, -4:])


def _pads(model: PreTrainedModel) -> bool:
    """Tell whether a prompt in a batch with a longer one gets the logits that it gets alone."""
    row = probe_tokens(model, _TRIED)[0, :-_STEPS]
    short = row[-4:]
    padded = torch.stack([row, torch.cat([torch.zeros_like(row[:-4]), short])])
    mask = torch.ones_like(padded)
    mask[1, :-4] = 0

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=_STEPS,
            eos_token_id=None,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda *_: [int(row[0])],
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            use_cache=True,
        )
        return torch.stack(out.logits, 1)

    return _equal(model, logits(padded, mask)[1:], logits(short[None], mask[:1, :4]))


def _equal(model: PreTrainedModel, logits: Tensor, reference: Tensor) -> bool:
    """Tell whether logits `[1, tokens, vocabulary]` agree in half of the digits of the model's dtype.

    Typically they may differ by 4 % in bfloat16 and by 0.02 % in float32, and by `_ROUGHLY` in a model that
    rounds the inputs of its linears. A wrong mask or position moves them by more.
    """
    schemes = (getattr(module, "quantization_scheme", None) for module in model.modules())
    rounds = any(scheme and scheme.input_activations for scheme in schemes)
    share = _ROUGHLY if rounds else torch.finfo(model.dtype).eps ** 0.5 / 2
    close = share * logit_size(reference)
    return logits.shape == reference.shape and logit_size(logits.float() - reference.float()) <= close


@torch.no_grad()
def reliable_length(model: PreTrainedModel) -> int | None:
    """Return the tokens beyond which a cached prefix gives wrong logits; None is no bound.

    A cache drops what has left its window. Where the masks have no window (Moshi), that is missing later. It
    shows in a few tokens while the config has a short window.
    """
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) is None:
        return None
    out = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    layers = getattr(out.get("past_key_values"), "layers", [])
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if not windows:
        return None
    with mock.patch.object(config, "sliding_window", 8):
        return None if _continues(model) else min(windows)


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

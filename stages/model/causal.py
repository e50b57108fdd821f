"""Causality: whether a model predicts each token from those before it alone.

transformers also loads models that look ahead, such as BERT or XLM, as causal language models. They see the
token that they predict, so their likelihoods are not those of a language model. A few tokens show it: in a
causal model, changing the later ones leaves all earlier logits as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.positions import most_tokens

if TYPE_CHECKING:
    from torch import Tensor, nn

_AHEAD = 0.1
"""Share of the influence of earlier tokens below which that of later tokens is rounding: in a mixture a token
may share an expert's product with later ones."""


def check_causal(model: nn.Module) -> None:
    """Refuse a model whose logits change with later tokens; it is run on three rows of at most 16 tokens.

    Raises:
        Refusal: the model looks ahead.
    """
    rows = probe_tokens(model, 16)
    half = rows.shape[1] // 2
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits
    whole, late, early = logits
    ahead, behind = logit_size((late - whole)[:half]), logit_size((early - whole)[half:])
    if ahead > _AHEAD * behind:
        family = model.config.model_type  # type: ignore[union-attr]
        raise Refusal(
            f"this {family} model looks ahead: its logits for a token change with later tokens, so it is no "
            "causal language model and its likelihoods mean nothing; use a model that was trained to predict "
            "the next token, or set is_decoder: true in its config.json if this was."
        )


def probe_tokens(model: nn.Module, length: int) -> Tensor:
    """Return token ids `[3, tokens]`, int64, on the model's device.

    The first is a row, the second has another second half, the third another first half.

    Args:
        length: tokens of a row; fewer if the model reads fewer.
    """
    length = min(length, most_tokens(model.config) or length)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(2 * length, device=embedding.weight.device) * 7 % embedding.num_embeddings
    row, other, half = ids[:length], ids[length:], length // 2
    return torch.stack([row, torch.cat([row[:half], other[half:]]), torch.cat([other[:half], row[half:]])])


def logit_size(logits: Tensor) -> float:
    """Return the typical size of logits or their differences, `[..., vocabulary]`, in nats.

    It is a median about a median, so that neither a common offset counts, nor tokens that a model rules out.
    """
    values = logits.float().cpu()
    return float((values - values.nanmedian(-1, keepdim=True).values).abs().nanmedian())

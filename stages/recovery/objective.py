"""The loss of a batch: cross entropy, and where there is a teacher its divergence from the student.

A teacher's distribution is kept as its k likeliest tokens and the rest as one more outcome. The divergence
between distributions on these k + 1 outcomes,

    T^2 * sum_i p_i * (log p_i - log q_i),    p, q proportional to (teacher, student)^(1/T),

is that over the whole vocabulary where k is all of it, and at T = 1 never more than it. Unlike one over the
k tokens alone it does not leave the student free to put what it likes on the others. T^2 keeps the gradient's
size when T grows (Hinton et al. 2015, 1503.02531).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.memory import exhausted
from stages.core.numbers import no_grad
from stages.corpus.rows import IGNORED, Batch, Row, TopLogits, collate
from stages.recovery.tuning import Distillation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def loss(model: PreTrainedModel, batch: Batch, distillation: Distillation | None) -> tuple[Tensor, int]:
    """The mean over predicted tokens, a scalar with its graph, and how many these are.

    Args:
        batch: on any device; its tensors are moved to the model's.
    """
    logits, wanted = predictions(model, batch)
    found = torch.nn.functional.cross_entropy(logits, wanted)
    if distillation is not None:
        if batch.teacher is None:
            raise ValueError("distillation needs a batch with a teacher")
        apart = divergence(logits, batch.teacher, distillation.temperature)
        found = found + distillation.weight * distillation.temperature**2 * apart
    return found, batch.predicted


def predictions(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """`[n, vocabulary]` fp32 logits at the n predicted tokens, in order, and those tokens `[n]`.

    The output head is run only at places where some row predicts.
    """
    device = model.device
    following = batch.labels.roll(-1, 1)  # the first label of a row is none, so that the last place has none
    places = (following != IGNORED).any(0).nonzero().squeeze(1)
    apart = {}
    if batch.position_ids is not None:
        positions = batch.position_ids.to(device)
        apart = {"position_ids": positions, "attention_mask": own_text(positions, model.dtype)}
    logits = model(
        input_ids=batch.input_ids.to(device), use_cache=False, logits_to_keep=places.to(device), **apart
    ).logits.flatten(0, 1)
    wanted = following[:, places].flatten()
    at = (wanted != IGNORED).nonzero().squeeze(1)
    if len(at) < len(wanted):
        logits = logits.index_select(0, at.to(device))
    return logits.float(), wanted[at].to(device)


def own_text(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's logits so that a token sees its own text up to itself, and nothing else.

    Not every family tells texts apart by their positions alone (OPT does not), so it is said outright.

    Args:
        positions: `[rows, length]`, 0 where a text begins.

    Returns:
        `[rows, 1, length, length]`, 0 or the lowest number of `dtype`.
    """
    text = (positions == 0).cumsum(1)
    seen = (text[:, None, :, None] == text[:, None, None, :]).tril()
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@no_grad
def check_packing(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """See that packed texts are apart for this model: what stands first in a row changes nothing behind it.

    Layers that carry a state along (recurrent ones, convolutions) take no notice of the mask, and others take
    none of its shape.

    Raises:
        Refusal: they are not.
    """
    row = next((row for row in rows if len(row) > 1), None)
    if row is None:
        return
    first, *others = row
    turned = replace(first, input_ids=first.input_ids.flip(0))
    behind = sum(int((one.labels != IGNORED).sum()) for one in others)
    was = model.training
    model.eval()
    try:
        found = [predictions(model, collate([(one, *others)]))[0][-behind:] for one in (first, turned)]
        apart = torch.equal(*found)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        if exhausted(error):
            raise
        log.info("a packed row: %s", error)
        apart = False
    model.train(was)
    if not apart:
        raise Refusal(
            f"{type(model).__name__} does not keep the examples of a packed row apart; say packing: false."
        )


def divergence(logits: Tensor, teacher: TopLogits, temperature: float) -> Tensor:
    """Mean KL(teacher || student) in nats at `temperature`, over the outcomes the teacher tells apart.

    Args:
        logits: the student's, `[n, vocabulary]` fp32.
        teacher: of the same n tokens.
    """
    tokens, kept = teacher.tokens.to(logits.device), teacher.log_probabilities.to(logits.device)
    student = logits.gather(1, tokens)
    if logits.shape[1] > tokens.shape[1]:
        # The rest by its own sum, not as one minus the others: that has no digits left where it is small.
        rest = logits.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
        student = torch.cat([student, rest], 1)
    log_p = (kept / temperature).log_softmax(1)
    # A student may have outcomes that its teacher, whose vocabulary is all kept, has not: of no probability.
    log_q = (student / temperature).log_softmax(1)[:, : kept.shape[1]]
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

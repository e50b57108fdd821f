"""The loss of a batch: cross entropy, and with a teacher its divergence from the student.

A teacher's distribution is stored as its k likeliest tokens, with all others as one more outcome. The
divergence between distributions over these k + 1 outcomes,

    T^2 * sum_i p_i * (log p_i - log q_i),    p, q proportional to (teacher, student)^(1/T),

equals that over the whole vocabulary if k is all of it, and at T = 1 never exceeds it. Unlike a divergence
over the k tokens alone, it does not leave the student free in what it gives to the others. T^2 keeps the size
of the gradient as T grows (Hinton et al. 2015, 1503.02531).
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
from stages.model.positions import sharing, switch_lengths
from stages.recovery.tuning import Distillation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def batch_loss(model: PreTrainedModel, batch: Batch, distillation: Distillation | None) -> tuple[Tensor, int]:
    """Return the mean loss over the predicted tokens, a scalar with its graph, and the number of tokens.

    Args:
        batch: on any device; its tensors are moved to the model's.
    """
    logits, targets = predictions(model, batch)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    if distillation is not None:
        if batch.teacher is None:
            raise ValueError("distillation needs a batch with a teacher")
        from_teacher = divergence(logits, batch.teacher, distillation.temperature)
        loss = loss + distillation.weight * distillation.temperature**2 * from_teacher
    return loss, batch.predicted


def predictions(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return fp32 logits `[n, vocabulary]` at the n predicted tokens, in order, and those tokens `[n]`.

    The output head runs only at positions where some row predicts. Rows run apart if longer ones would change
    the rotary frequencies of the others.
    """
    apart = sharing(model.config, batch.longest)
    if len(apart) > 1:
        return _predictions_apart(model, batch, apart)
    device = model.device
    next_labels = batch.labels.roll(-1, 1)  # a row's first label is IGNORED, and becomes its last
    places = (next_labels != IGNORED).any(0).nonzero().squeeze(1)
    packed = {}
    if batch.position_ids is not None:
        positions = batch.position_ids.to(device)
        packed = {"position_ids": positions, "attention_mask": packing_mask(positions, model.dtype)}
    logits = model(
        input_ids=batch.input_ids.to(device), use_cache=False, logits_to_keep=places.to(device), **packed
    ).logits.flatten(0, 1)
    targets = next_labels[:, places].flatten()
    predicted = (targets != IGNORED).nonzero().squeeze(1)
    if len(predicted) < len(targets):
        logits = logits.index_select(0, predicted.to(device))
    return logits.float(), targets[predicted].to(device)


def _predictions_apart(
    model: PreTrainedModel, batch: Batch, groups: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Do as `predictions`, a forward for each of the groups of rows, by their places."""
    counts = (batch.labels != IGNORED).sum(1).tolist()
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for places in groups:
        sizes = [counts[place] for place in places]
        parts = [each.split(sizes) for each in predictions(model, batch.part(places))]
        rows |= zip(places, zip(*parts, strict=True), strict=True)
    logits, targets = zip(*(rows[place] for place in range(len(counts))), strict=True)
    return torch.cat(logits), torch.cat(targets)


def packing_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of attention with which a token sees its own text up to itself, and nothing else.

    Some families (OPT) do not tell texts apart by their positions alone.

    Args:
        positions: `[rows, length]`, 0 where a text begins.

    Returns:
        `[rows, 1, length, length]`, 0 or the lowest number of `dtype`.
    """
    text = (positions == 0).cumsum(1)
    visible = (text[:, None, :, None] == text[:, None, None, :]).tril()
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


@no_grad
def check_packing(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """Check that this model keeps packed texts apart: the first text of a row must not affect the others.

    Layers that carry a state along (recurrent or convolutional) ignore the mask; other models fail on its
    shape.

    Raises:
        Refusal: it does not.
    """
    row = next((row for row in rows if len(row) > 1), None)
    if row is None:
        return
    for part in rows:
        if len(sharing(model.config, [len(item.input_ids) for item in part])) > 1:
            limit = switch_lengths(model.config)[0]
            raise Refusal(
                f"a packed row has an example longer than {limit} tokens, where {type(model).__name__} "
                "changes the rotary frequencies of the whole row; set packing: false, or lower "
                f"sequence_length to at most {limit}."
            )
    first, *others = row
    reversed_first = replace(first, input_ids=first.input_ids.flip(0))
    count = sum(int((example.labels != IGNORED).sum()) for example in others)
    training = model.training
    model.eval()
    try:
        logits = [
            predictions(model, collate([(example, *others)]))[0][-count:]
            for example in (first, reversed_first)
        ]
        apart = torch.equal(*logits)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        if exhausted(error):
            raise
        log.info("a forward pass of a packed row failed: %s", error)
        apart = False
    model.train(training)
    if not apart:
        raise Refusal(
            f"{type(model).__name__} does not keep the examples of a packed row apart; set packing: false."
        )


def divergence(logits: Tensor, teacher: TopLogits, temperature: float) -> Tensor:
    """Return the mean KL(teacher || student) in nats at `temperature`, over the outcomes the teacher has.

    Args:
        logits: the student's, `[n, vocabulary]` fp32.
        teacher: of the same n tokens.
    """
    tokens, teacher_log = teacher.tokens.to(logits.device), teacher.log_probabilities.to(logits.device)
    student = logits.gather(1, tokens)
    if logits.shape[1] > tokens.shape[1]:
        # The rest has its own sum; one minus the others would have no accurate digits where it is small.
        rest = logits.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
        student = torch.cat([student, rest], 1)
    log_p = (teacher_log / temperature).log_softmax(1)
    # A teacher stored with its whole vocabulary has no outcome for the student's other tokens: probability 0.
    log_q = (student / temperature).log_softmax(1)[:, : teacher_log.shape[1]]
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

"""Gradients of the next-token loss, window by window: summed, or each kept as a sketch.

To first order, zeroing a weight w changes the loss by w times the gradient of the mean loss over all windows.
The prompt of a window can be left out of the loss, so that only its continuation counts.

The gradient of a single window in a block is as large as the block. If many of them are kept, only their dot
products are needed, and these survive a count sketch (Charikar, Chen and Farach-Colton 2002): every entry is
added, with a random sign, to one of `WIDTH` random buckets. Dot products of sketches equal those of the
gradients in expectation.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.corpus.rows import IGNORED
from stages.model.blocks import Linear, blocks, check_length

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WIDTH = 2**14
"""Entries of a sketch."""

log = logging.getLogger(__name__)


def window_loss(model: PreTrainedModel, window: Tensor, prompt_length: int) -> Tensor:
    """Return the mean loss in nats of a window `[sequence_length]` after its first `prompt_length` tokens."""
    batch = window[None].to(model.device)
    labels = batch.clone()
    labels[:, :prompt_length] = IGNORED
    loss: Tensor = model(input_ids=batch, labels=labels, use_cache=False).loss
    return loss


def mean_loss(model: PreTrainedModel, windows: Tensor, prompt_length: int = 1) -> float:
    """Return the mean loss in nats of `windows` `[num_samples, sequence_length]`, without their prompts."""
    with torch.no_grad():
        return sum(float(window_loss(model, window, prompt_length)) for window in windows) / len(windows)


def loss_gradients(
    model: PreTrainedModel, targets: Sequence[Linear], windows: Tensor, *, prompt_length: int = 1, label: str
) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of `mean_loss` in every linear, `[out, in]` fp32 by its full name, and the loss.

    Args:
        windows: `[num_samples, sequence_length]` token ids.
        prompt_length: tokens at the start of each window that are read but not predicted.
        label: of the progress bar.

    Raises:
        Refusal: the loss or a gradient is not finite.
    """
    check_length(model, windows)
    model.requires_grad_(False)
    weights = {linear.name: linear.module.get_parameter("weight").requires_grad_(True) for linear in targets}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    total = 0.0
    for window in tqdm(windows, desc=label, unit="window"):
        loss = window_loss(model, window, prompt_length)
        loss.backward()
        total += float(loss.detach())
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name] += weight.grad
                weight.grad = None
    model.requires_grad_(False)
    gradients = {
        linear.name: sums[linear.name].T if linear.transposed else sums[linear.name] for linear in targets
    }
    for gradient in gradients.values():
        gradient /= len(windows)
    if broken := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        raise Refusal(
            f"NaN or infinite gradients in {', '.join(broken)} at a loss of {total / len(windows)}; nothing "
            "was written. Set run.dtype to bfloat16 or float32, or check the source."
        )
    if zero := [name for name, gradient in gradients.items() if not gradient.any()]:
        log.warning("the loss has a zero gradient in %s", ", ".join(zero))
    return gradients, total / len(windows)


def sketches(model: PreTrainedModel, windows: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Return a sketch of each window's gradient in each block, `[windows, WIDTH]` fp32 by full name.

    Args:
        windows: `[num_samples, sequence_length]` token ids.
        names: full names of blocks.
    """
    check_length(model, windows)
    chosen = {name: block for name, block in blocks(model) if name in names}
    out = {name: torch.zeros(len(windows), WIDTH, device=model.device) for name in chosen}
    model.requires_grad_(False)
    for block in chosen.values():
        block.requires_grad_(True)
    for number, window in enumerate(tqdm(windows, desc="gradients", unit="window")):
        window_loss(model, window, prompt_length=1).backward()
        for name, block in chosen.items():
            for seed, parameter in enumerate(block.parameters()):
                if parameter.grad is not None:
                    _add(out[name][number], parameter.grad.flatten(), seed)
        model.zero_grad(set_to_none=True)
    return out


def _add(sketch: Tensor, values: Tensor, seed: int) -> None:
    """Add the values, with random signs, to random buckets of the sketch in place."""
    draw = torch.Generator().manual_seed(seed)
    buckets = torch.randint(2 * WIDTH, values.shape, generator=draw, dtype=torch.int32).to(values.device)
    signed = torch.where(buckets < WIDTH, values.float(), -values.float())
    # A sum by one-hot products would be larger than the gradient; index_add sums in order on a CPU.
    sketch.index_add_(0, buckets % WIDTH, signed)

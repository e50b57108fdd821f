"""Gradients of the next-token loss, one window at a time: summed up, or small enough to keep each.

To first order, zeroing a weight w changes the loss by w times its gradient, which is asked of the mean loss
over all windows. A prompt may be left out of the loss: what is learned is then how the rest is said.

Where each window counts by itself, its gradient in a block is as large as the block. What is asked of many
of them are dot products, which survive a count sketch (Charikar, Chen and Farach-Colton 2002): every entry
is added, with a drawn sign, to one of `WIDTH` drawn buckets. Dot products of sketches are those of the
gradients in expectation.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks, check_length

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.model.blocks import Linear

WIDTH = 2**14

log = logging.getLogger(__name__)


def window_loss(model: PreTrainedModel, window: Tensor, prompt_length: int) -> Tensor:
    """Mean nats of the tokens of a `window` after the first `prompt_length`, each given those before."""
    batch = window[None].to(model.device)
    labels = batch.clone()
    labels[:, :prompt_length] = -100  # what transformers leaves out of a loss
    loss: Tensor = model(input_ids=batch, labels=labels, use_cache=False).loss
    return loss


def mean_loss(model: PreTrainedModel, windows: Tensor, prompt_length: int = 1) -> float:
    """Mean nats a token over `windows` `[num_samples, sequence_length]`, prompts left out."""
    with torch.no_grad():
        return sum(float(window_loss(model, window, prompt_length)) for window in windows) / len(windows)


def loss_gradients(
    model: PreTrainedModel, found: list[Linear], windows: Tensor, *, prompt_length: int = 1, label: str
) -> tuple[dict[str, Tensor], float]:
    """The gradient of `mean_loss` in every linear, `[out, in]` fp32 by its full name, and the loss.

    Args:
        windows: `[num_samples, sequence_length]` token ids.
        prompt_length: tokens at the start of each window that are given and not predicted.
        label: shown on the progress bar.

    Raises:
        Refusal: the loss or a gradient is not finite.
    """
    check_length(model, windows)
    model.requires_grad_(False)
    weights = {one.name: one.module.get_parameter("weight").requires_grad_(True) for one in found}
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
    gradients = {one.name: sums[one.name].T if one.transposed else sums[one.name] for one in found}
    for gradient in gradients.values():
        gradient /= len(windows)
    if broken := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        raise Refusal(
            f"NaN or infinite gradients in {', '.join(broken)}, the loss being {total / len(windows)}; "
            "nothing was written."
        )
    if dead := [name for name, gradient in gradients.items() if not gradient.any()]:
        log.warning("no token moves the loss through %s", ", ".join(dead))
    return gradients, total / len(windows)


def sketches(model: PreTrainedModel, windows: Tensor, names: list[str]) -> dict[str, Tensor]:
    """A sketch of each window's gradient in each block: `[windows, WIDTH]` fp32 by the block's full name.

    Args:
        windows: `[num_samples, sequence_length]` token ids.
        names: full names of blocks.
    """
    check_length(model, windows)
    found = {name: block for name, block in blocks(model) if name in names}
    out = {name: torch.zeros(len(windows), WIDTH, device=model.device) for name in found}
    model.requires_grad_(False)
    for block in found.values():
        block.requires_grad_(True)
    for number, window in enumerate(tqdm(windows, desc="gradients", unit="window")):
        batch = window[None].to(model.device)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        for name, block in found.items():
            for seed, parameter in enumerate(block.parameters()):
                if parameter.grad is not None:
                    _add(out[name][number], parameter.grad.flatten(), seed)
        model.zero_grad(set_to_none=True)
    return out


def _add(sketch: Tensor, values: Tensor, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    buckets = torch.randint(2 * WIDTH, values.shape, generator=draw).to(values.device)
    signed = torch.where(buckets < WIDTH, values.float(), -values.float())
    # A sum by one-hot products would be larger than the gradient; index_add sums in order on a CPU.
    sketch.index_add_(0, buckets % WIDTH, signed)

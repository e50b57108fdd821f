"""Gradients of the next-token loss, one window at a time, small enough to keep.

A block's gradient on one window is as large as the block. What is asked of many of them are dot products,
which survive a count sketch (Charikar, Chen and Farach-Colton 2002): every entry is added, with a drawn
sign, to one of `WIDTH` drawn buckets. Dot products of sketches are those of the gradients in expectation.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 2**14


def sketches(model: "PreTrainedModel", windows: Tensor, names: list[str]) -> dict[str, Tensor]:
    """A sketch of each window's gradient in each block: `[windows, WIDTH]` fp32 by the block's full name.

    Args:
        windows: `[num_samples, sequence_length]` token ids.
        names: full names of blocks.
    """
    from stages.core.blocks import blocks

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

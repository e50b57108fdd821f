"""The rows of a forward where a suite names no batch size: many on a GPU, as long as its memory holds them.

A GPU is only busy with many rows, a CPU is as fast with few. Rows take keys and values of all their tokens,
states of those that are read, logits of those that predict. The number depends on the model, the requests and
the size of the memory, and not on its use by others, so that equal inputs give equal bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARE = 0.7
"""Share of the memory that weights and rows may take."""
_COPIES = 3
"""Copies of keys and values: those of the prefix, repeated for each row, and with the new tokens."""
_STATES = 16
"""Tensors of the size of the hidden states that are in memory at once."""


VLLM_ROWS = 256
"""Requests that vLLM generates at once where a suite names no batch size, which is its own default."""


def usual_rows(device: torch.device) -> int:
    """Return the most rows of a forward where a suite names no batch size."""
    return 64 if device.type == "cuda" else 8


def memory_of(device: torch.device) -> int | None:
    """Return the bytes that a GPU has, in use or not; None elsewhere."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def fitting_rows(model: PreTrainedModel, memory: int, *, tokens: int, new: int, predicting: int) -> int:
    """Return how many rows fit into memory, at least one.

    Args:
        memory: bytes, see `memory_of`.
        tokens: the most tokens of a row, those in a cached prefix included.
        new: the most tokens of a row that are not cached.
        predicting: the most tokens of a row that get logits.
    """
    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    layers = getattr(out.get("past_key_values"), "layers", [])
    kept = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    config, wide = model.config.get_text_config(), torch.finfo(model.dtype).bits // 8
    row = _COPIES * tokens * sum(tensor.nbytes for tensor in kept if tensor is not None)
    row += new * (
        _STATES * config.hidden_size * wide + getattr(config, "num_attention_heads", 0) * tokens * (4 + wide)
    )
    row += predicting * out.logits.shape[-1] * (wide + 8)  # and log-probabilities, twice in float32
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return max(1, int((_SHARE * memory - weights) // row))

"""Error by block: how far a compressed model's blocks are from those of its source, on calibration text.

A perplexity says that a model lost something, not where. So some calibration windows run through the source
and through the result, each with its own blocks from the first to the last, and the outputs h and h' of every
block are compared: the error is the mean over tokens of |h' - h| / |h|. It is taken token by token because a
few tokens have outputs a thousand times larger than the rest.

The error is that of the weights: a format that rounds inputs too is run without doing so. The method has read
this text; other text may lose more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from stages.core.lazy import mock, torch
from stages.corpus.windows import Tokens, calibration_windows, text_windows
from stages.model.artifact import never_rescale
from stages.model.blocks import blocks, check_length, forward

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.compress.home import Home

MOST_TOKENS = 512
"""Tokens compared at most: their outputs of all blocks are in the CPU's memory together."""
_DIGITS = 3
"""Digits recorded; the rest differs between processors."""


def sample_windows(calibration: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor | None:
    """Return the first windows of a calibration, or a part of one, `[n, tokens]`; None if it reads none.

    For text that a model generates these are the windows of the data set that it continues.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        Refusal: the data set has too few windows, or tokens without a row in the embedding.
    """
    if not isinstance(calibration, Tokens):
        return None
    draw = calibration_windows if calibration.tokens == "random" else text_windows
    windows: Tensor = draw(tokenizer, calibration, vocab_size)
    return windows[: max(1, MOST_TOKENS // windows.shape[1]), :MOST_TOKENS]


def block_outputs(
    model: PreTrainedModel, windows: Tensor, home: Home, *, dense: bool = False
) -> list[Tensor]:
    """Return the output of every block for the windows, `[n, tokens, hidden]` on the CPU.

    Args:
        home: where the weights live.
        dense: see `Home.block`.
    """
    check_length(model, windows)
    outputs: list[Tensor] = []

    def step(name: str, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with home.block(name, block, dense=dense):
                output = original(*args, **kwargs)
            outputs.append((output if isinstance(output, torch.Tensor) else output[0]).cpu())
            return output

        return run

    with torch.no_grad(), ExitStack() as patches:
        for name, block in blocks(model):
            patches.enter_context(mock.patch.object(block, "forward", step(name, block, block.forward)))
        forward(model, windows)
    return outputs


def error_note(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Any]:
    """Return the record's note on the outputs of corresponding blocks of a source and its result."""
    return {
        "block_errors": {
            "tokens": before[0].shape[0] * before[0].shape[1],
            "errors": [_error(h, other) for h, other in zip(before, after, strict=True)],
        }
    }


def _error(before: Tensor, after: Tensor) -> float | None:
    """Return the mean relative error over tokens, rounded; None if it is not finite."""
    wide = before.double()
    error = float(((after.double() - wide).norm(dim=-1) / wide.norm(dim=-1)).mean())
    rounded = float(f"{error:.{_DIGITS}g}")
    return rounded if rounded < float("inf") else None


def rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights whose modules follow its config, which may have changed."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(
            model.config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        ).eval()
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    never_rescale(plain)
    for module in plain.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(model.device)
    return plain

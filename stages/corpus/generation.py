"""Calibration on the model's own text: continuations sampled from it, token by token.

A pruned model is used on text that it writes itself. This text differs from its calibration text: it is
likelier under the model, and its errors are the model's own. RESP (2512.02185) therefore calibrates on
self-generated windows. Here the first tokens of a data set's windows are prompts, and the rest of each window
is sampled from the model, many windows at a time, from what it keeps of the tokens before. Special tokens,
including the end of text, are never sampled: a window is running text of full length, without padding.

A token is drawn by inverting the cumulative distribution at a uniform number. The numbers come from one
generator on the CPU, a row per window, so neither the device nor the batch size decides which numbers are
used; as everywhere, both can change the last bits of the logits. RWKV continues one window at a time, as
transformers computes its state wrongly for several. A model with LongRoPE reads its windows again when they
reach the length where its rotary frequencies change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import no_grad, sample
from stages.corpus.windows import (
    Tokens,
    Windows,
    calibration_windows,
    distinct_rows,
    text_token_ids,
    text_windows,
)
from stages.model.blocks import check_length, embedding_rows
from stages.model.positions import switch_lengths
from stages.model.stepping import read_on

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD_TOKENS = 2**16
"""Tokens, prompts included, of the windows generated at a time on a card unless a batch size is set.

The model keeps keys and values of all of them, 8 GiB for Llama-3.1-8B. A CPU takes all windows at once.
"""


def model_windows(
    tokenizer: PreTrainedTokenizerBase,
    wanted: Windows,
    vocab_size: int,
    load: Callable[[], PreTrainedModel],
) -> Tensor:
    """Return `[num_samples, sequence_length]` int64 token ids, distinct windows of the kind `wanted` names.

    Args:
        vocab_size: rows of the model's embedding.
        load: returns the whole model in memory; called only to generate.

    Raises:
        Refusal: there are too few distinct windows, they have tokens without a row in the embedding, or they
            are longer than the model's context.
    """
    if not isinstance(wanted, Tokens) or wanted.tokens != "generated":
        return calibration_windows(tokenizer, wanted, vocab_size)
    assert wanted.seed is not None
    draw = torch.Generator().manual_seed(wanted.seed)
    return generate_windows(load(), tokenizer, wanted, text_windows(tokenizer, wanted, vocab_size), draw)


def generate_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Tokens,
    texts: Tensor,
    draw: torch.Generator,
) -> Tensor:
    """Return the windows `texts` `[num_samples, sequence_length]`, continued by the model after their prompt.

    Args:
        wanted: `prompt_length`, `temperature` and `batch_size` are read.
        draw: a CPU generator, advanced by one number per generated token.

    Raises:
        Refusal: some windows are equal or longer than the model's context, or logits are not finite.
    """
    assert wanted.prompt_length is not None and wanted.temperature is not None
    check_length(model, texts)
    length = texts.shape[1] - wanted.prompt_length
    numbers = torch.rand(len(texts), length, generator=draw, dtype=torch.float64)
    default = max(1, CARD_TOKENS // texts.shape[1]) if model.device.type == "cuda" else len(texts)
    size = wanted.batch_size or default
    ids = text_token_ids(tokenizer, embedding_rows(model))
    with tqdm(total=len(texts) * length, desc="generating", unit="token") as bar:
        windows = torch.cat(
            [
                continue_prompts(model, prompts, uniform, ids, wanted.temperature, bar.update)
                for prompts, uniform in zip(
                    texts[:, : wanted.prompt_length].split(size), numbers.split(size), strict=True
                )
            ]
        )
    if (distinct := len(distinct_rows(windows))) < len(windows):
        raise Refusal(
            f"only {distinct} of {len(windows)} generated windows are distinct; raise temperature or "
            "prompt_length, or lower num_samples."
        )
    return windows


@no_grad
def continue_prompts(
    model: PreTrainedModel,
    prompts: Tensor,
    uniform: Tensor,
    ids: Tensor,
    temperature: float,
    progress: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """Continue `prompts` `[n, p]` by one sampled token per number of `uniform` `[n, m]`; return `[n, p + m]`.

    Args:
        uniform: in [0, 1), fp64; the token is the first at which the cumulative probability exceeds it.
        ids: the tokens that may be drawn, ascending.
        progress: called with the number of tokens drawn at each step.

    Raises:
        Refusal: the model's logits are not finite, or it keeps nothing to continue from.
    """
    from stages.corpus.padding import batches_well  # imports classes of transformers

    if len(prompts) > 1 and not batches_well(model):
        rows = zip(prompts.split(1), uniform.split(1), strict=True)
        return torch.cat([continue_prompts(model, *row, ids, temperature, progress) for row in rows])
    columns, last, kept = [prompts], prompts, dict[str, Any]()
    switches = switch_lengths(model.config)
    for length, numbers in enumerate(uniform.T, start=prompts.shape[1]):
        if length - 1 in switches:
            last, kept = torch.cat(columns, 1), {}
        logits, kept = read_on(model, last.to(model.device), kept)
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise Refusal("the model's logits are not finite, so it cannot generate; set tokens: text.")
        last = ids[sample(logits[:, ids], numbers, temperature)]
        columns.append(last)
        progress(len(last))
    return torch.cat(columns, 1)

"""Calibration on what the model itself says: continuations sampled from it, token by token.

A pruned model is used on text it writes, which is not the text it was calibrated on: it is likelier under
the model, and its errors are the model's own. RESP (2512.02185) therefore calibrates on self-generated
windows. Here the first tokens of a data set's windows are the prompts, and the rest of each window is drawn
from the model with a cache of keys, many windows at a time. Special tokens, an end of text among them, are
never drawn: a window is running text of full length, without padding.

The draw is the inverse of the cumulative distribution at uniform numbers that come from one generator on
the CPU, a row of them a window, so that neither the device nor the batch size decides on which numbers are
used; as everywhere, both can change the last bits of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import no_grad, sample
from stages.corpus.windows import Tokens, Windows, calibration_windows, ordinary, text_windows, unrepeated
from stages.model.blocks import check_length

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_windows(
    tokenizer: PreTrainedTokenizerBase, wanted: Windows, whole: Callable[[], PreTrainedModel]
) -> Tensor:
    """`[num_samples, sequence_length]` int64 token ids, distinct, of the kind `wanted` asks for.

    Args:
        whole: loads the model all in memory; called only where it is to generate.

    Raises:
        Refusal: there are fewer distinct windows than asked for, or they are longer than the model reads.
    """
    if not isinstance(wanted, Tokens) or wanted.tokens != "generated":
        return calibration_windows(tokenizer, wanted)
    assert wanted.seed is not None
    draw = torch.Generator().manual_seed(wanted.seed)
    return generated(whole(), tokenizer, wanted, text_windows(tokenizer, wanted), draw)


def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Tokens,
    texts: Tensor,
    draw: torch.Generator,
) -> Tensor:
    """Windows that begin as `texts` `[num_samples, sequence_length]` do and go on as the model does.

    Args:
        wanted: its `prompt_length`, `temperature` and `batch_size` are read.
        draw: a generator on the CPU; one number is taken from it for every token generated.

    Raises:
        Refusal: windows came out alike, or are longer than the model reads, or logits are not numbers.
    """
    assert wanted.prompt_length is not None and wanted.temperature is not None
    check_length(model, texts)
    length = texts.shape[1] - wanted.prompt_length
    numbers = torch.rand(len(texts), length, generator=draw, dtype=torch.float64)
    size = wanted.batch_size or len(texts)
    ids = ordinary(tokenizer)
    with tqdm(total=len(texts) * length, desc="generating", unit="token") as bar:
        made = torch.cat(
            [
                continued(model, prompts, uniform, ids, wanted.temperature, bar.update)
                for prompts, uniform in zip(
                    texts[:, : wanted.prompt_length].split(size), numbers.split(size), strict=True
                )
            ]
        )
    if (distinct := len(unrepeated(made))) < len(made):
        raise Refusal(
            f"the model generated {distinct} distinct windows where {len(made)} were asked for; raise "
            "temperature or prompt_length, or lower num_samples."
        )
    return made


@no_grad
def continued(
    model: PreTrainedModel,
    prompts: Tensor,
    uniform: Tensor,
    ids: Tensor,
    temperature: float,
    told: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """`prompts` `[n, p]` followed by as many sampled tokens as `uniform` `[n, m]` has numbers, `[n, p + m]`.

    Args:
        uniform: in [0, 1), fp64; the token is the first at which the cumulative probability exceeds it.
        ids: the tokens that may be drawn, ascending.
        told: called with the number of tokens drawn.

    Raises:
        Refusal: the model's logits are not finite, or it hands out no keys and values to go on from.
    """
    out, cache, last = [prompts], None, prompts
    for column in uniform.T:
        step = model(input_ids=last.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = getattr(step, "past_key_values", None)
        if cache is None:
            raise Refusal(
                f"{type(model).__name__} hands out no keys and values of the tokens it has read, which "
                "generating goes on from; calibrate on tokens: text."
            )
        logits = step.logits[:, -1].float().cpu()
        drawable = ids[ids < logits.shape[1]]
        if not logits.isfinite().all():
            raise Refusal("the model's logits are not finite numbers, so nothing can be generated from it.")
        last = drawable[sample(logits[:, drawable], column, temperature)]
        out.append(last)
        told(len(last))
    return torch.cat(out, 1)

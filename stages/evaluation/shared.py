"""The model as lm-eval asks it, what prompts have in common computed once.

lm-eval runs a model over the whole of every request: over the few-shot examples again for each item, and
over the question again for each choice. Attention looks back only, so keys and values of a common
beginning are the same in all of them. Here they are computed once and kept: those of what all requests
begin with, and, for likelihoods, those of each question.

Questions of a batch are kept up to one length, that of the shortest, so that no padding comes to lie between
what is kept and what is new: this holds for every kind of position and window. Generation needs rows that
end together; there the padding follows the common beginning, masked, and prompts that might outgrow a
sliding window are computed whole.

Sums of floats come out in another order than lm-eval's; in exact arithmetic nothing would differ.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from stages.evaluation.kept import Finished

SHORTEST = 4
"""Tokens of a common beginning below which it is not worth keeping."""
Tokens = tuple[int, ...]


class Row(NamedTuple):
    """What one row of a forward reads: a context, and all of a continuation but its last token.

    The last token is only predicted, so continuations that differ in it alone share a row.
    """

    context: Tokens
    tokens: Tokens


class SharedPrefixLM(HFLM):
    """HFLM without its repetition; made and used in the same way.

    Args:
        finished: where answers of tasks that are done are kept, and taken from; None keeps none.
    """

    def __init__(self, *args: Any, finished: "Finished | None" = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._prefix: Tokens = ()
        self._kept: Cache | None = None
        self.finished = finished

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each request's continuation, and whether greedy decoding gives it."""

        def ask() -> list[Any]:
            return super(SharedPrefixLM, self).loglikelihood(requests, disable_tqdm=disable_tqdm)

        return [(total, greedy) for total, greedy in self._answers("loglikelihood", requests, ask)]

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each request's whole text."""

        def ask() -> list[Any]:
            return super(SharedPrefixLM, self).loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

        return self._answers("loglikelihood_rolling", requests, ask)

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """What follows each request's prompt, up to what ends it."""

        def ask() -> list[Any]:
            self._keep(tuple(self.tok_encode(request.args[0])) for request in requests)
            return super(SharedPrefixLM, self).generate_until(requests, disable_tqdm=disable_tqdm)

        return self._answers("generate_until", requests, ask)

    def _answers(self, kind: str, requests: "list[Instance]", ask: Callable[[], list[Any]]) -> list[Any]:
        if self.finished is None:
            return ask()
        return self.finished.take(kind, [request.args for request in requests], ask)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding would give it.

        Args:
            requests: a name, the tokens of a context and of its continuation, each.
            override_bs: rows a forward, where it is not the batch size.
        """
        rows: dict[Row, list[int]] = {}
        cut = []  # too long for the model: lm-eval shortens them and says so
        for i, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) > self.max_length + 1:
                cut.append(i)
            else:
                rows.setdefault(Row(tuple(context), (*context, *continuation[:-1])), []).append(i)
        questions = {row.context for row in rows}
        self._keep(questions)
        if self._kept is None and (len(rows) == len(questions) or max(map(len, questions)) <= SHORTEST):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        if cut:
            found = super()._loglikelihood_tokens([requests[i] for i in cut], disable_tqdm, override_bs)
            answers.update(zip(cut, found, strict=True))
        ordered = sorted(rows, key=lambda row: (-len(row.context), row))
        size = override_bs or self.batch_size
        bar = tqdm(total=len(requests), initial=len(cut), disable=disable_tqdm, desc="Likelihoods")
        for first in range(0, len(ordered), size):
            batch = ordered[first : first + size]
            for row, log_probs in zip(batch, self._log_probs(batch), strict=True):
                for i in rows[row]:
                    name, _, continuation = requests[i]
                    answers[i] = _score(log_probs, continuation)
                    if name is not None:
                        self.cache_hook.add_partial("loglikelihood", name, answers[i])
                bar.update(len(rows[row]))
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """`context` `[rows, tokens]`, padded on the left, each row with what follows it."""
        mask, size = options["attention_mask"], len(self._prefix)
        pads = (context.shape[1] - mask.sum(1)).tolist()
        prompts = [tuple(row[pad:].tolist()) for row, pad in zip(context, pads, strict=True)]
        several = options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1
        if (
            self._kept is None
            or several
            or max_length > _window(self._kept)  # of which padding would take a part
            or any(len(prompt) <= size or prompt[:size] != self._prefix for prompt in prompts)
        ):
            return super()._model_generate(context, max_length, stop, **options)

        def prefix_first(rows: Tensor) -> Tensor:
            moved = [
                torch.cat([row[pad : pad + size], row[:pad], row[pad + size :]])
                for row, pad in zip(rows, pads, strict=True)
            ]
            return torch.stack(moved)

        options |= {"attention_mask": prefix_first(mask), "past_key_values": self._beginning(len(context))}
        return super()._model_generate(prefix_first(context), max_length, stop, **options)

    def _keep(self, prompts: Iterable[Tokens]) -> None:
        """Compute and keep keys and values of what all `prompts` begin with, short of their last token."""
        distinct = sorted(set(prompts))
        self._prefix, self._kept = (), None
        if len(distinct) < 2:
            return
        room = min(map(len, distinct)) - 1
        common = _common(distinct[0], distinct[-1])[:room]  # of sorted ones the ends differ first
        if len(common) >= SHORTEST:
            cache = self._forward([common], None, keep=1).past_key_values
            if _repeatable(cache):
                self._prefix, self._kept = common, cache

    def _beginning(self, rows: int) -> Cache | None:
        """Keys and values of the common beginning for so many rows; None where there is none."""
        cache = copy.deepcopy(self._kept)
        if cache is not None:
            cache.batch_repeat_interleave(rows)
        return cache

    def _log_probs(self, batch: Sequence[Row]) -> Iterator[Tensor]:
        """Log-probabilities `[tokens, vocabulary]` of each row: what follows its context and later tokens."""
        questions = list(dict.fromkeys(row.context for row in batch))
        cache, done = self._beginning(len(questions)), len(self._prefix)
        shared = min(map(len, questions)) - 1
        if len(questions) < len(batch) and shared - done >= SHORTEST:
            told = self._forward([question[done:shared] for question in questions], cache, keep=1)
            cache, done = told.past_key_values, shared
        if cache is not None:
            owners = [questions.index(row.context) for row in batch]
            cache.batch_select_indices(torch.tensor(owners, device=self.device))
        longest = max(len(row.tokens) for row in batch)
        padded = [(*row.tokens[done:], *[0] * (longest - len(row.tokens))) for row in batch]
        for row, logits in zip(batch, self._forward(padded, cache).logits, strict=True):
            told = logits[len(row.context) - 1 - done : len(row.tokens) - done]
            yield torch.log_softmax(told, -1, dtype=self.softmax_dtype)

    def _forward(self, rows: Sequence[Tokens], cache: Cache | None, keep: int = 0) -> Any:
        """One forward of rows of one length after `cache`; logits of the last `keep` tokens, 0 for all."""
        ids = torch.tensor(rows, device=self.device)
        with torch.no_grad():
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)


def _common(one: Tokens, other: Tokens) -> Tokens:
    """What both begin with."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return one[: same.index(False)] if False in same else one[: len(same)]


def _score(log_probs: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    wanted = torch.tensor(continuation, device=log_probs.device)
    told = log_probs[-len(continuation) :]
    return float(told.gather(1, wanted[:, None]).sum()), bool((told.argmax(-1) == wanted).all())


def _repeatable(cache: Cache | None) -> bool:
    """Whether rows of the cache can be repeated: it holds attention's keys and values and nothing else."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return cache is not None and all(type(layer) in kinds for layer in cache.layers)


def _window(cache: Cache) -> int:
    """Tokens that the narrowest layer sees."""
    return min((layer.sliding_window for layer in cache.layers if layer.is_sliding), default=2**63)

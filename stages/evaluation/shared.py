"""Run lm-eval's requests on a model, computing each common prefix of the prompts once.

lm-eval runs a model over the whole of every request: over the few-shot examples again for each item, and over
the question again for each choice. Attention only looks back, so keys and values of a common prefix are the
same in all requests. They are computed once here and reused: those of the prefix of all requests and, for
likelihoods, those of each question.

The questions of a batch are reused up to the length of the shortest, so no padding lies between reused and
new tokens; this holds for every kind of position and window. Generation needs rows that end together: there
padding follows the common prefix, masked, if the model counts positions by the mask and no row may outgrow a
sliding window; other prompts of unequal length are computed whole. A model that keeps more than keys and
values, such as the state of Mamba, shares nothing, and generates in batches of equal lengths
(`stages.corpus.padding`).

Sums of floats are taken in another order than lm-eval's; in exact arithmetic nothing would differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from stages.core.errors import Refusal
from stages.core.lazy import mock
from stages.corpus.padding import Batching, batching, counts_by_mask, generate_rows
from stages.corpus.windows import check_token_ids

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.evaluation.kept import KeptAnswers

_SHORTEST_PREFIX = 4
"""A common prefix shorter than this is not worth reusing."""
_BLIND_TO_PADDING = {"attention_mask", "do_sample", "temperature", "top_k", "top_p", "min_p"}
"""Options of `generate` that look at the next token alone; a penalty, for example, counts padding as text."""
TokenIds = tuple[int, ...]


class LikelihoodRow(NamedTuple):
    """One row of a forward for likelihoods: a context, then a continuation without its last token.

    The last token is only predicted, so continuations that differ in nothing else share a row.
    """

    context: TokenIds
    tokens: TokenIds
    """The context included."""


class SharedPrefixLM(HFLM):
    """HFLM without its repetition, called the same way.

    Args:
        options: those of HFLM.
        kept_answers: keeps the answers to finished tasks; None keeps none.
    """

    def __init__(
        self,
        *,
        pretrained: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kept_answers: KeptAnswers | None = None,
        **options: Any,
    ) -> None:
        _name_end(tokenizer, pretrained)  # lm-eval would pad with a token that the model has not
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **options)
        # A checkpoint's own settings may sample, or penalize repetition: a suite says so, or nothing does.
        ends = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=ends)
        self.batching = batching(self.model)
        self._prefix: TokenIds = ()
        self._prefix_cache: Cache | None = None
        self.kept_answers = kept_answers

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            Refusal: neither the tokenizer nor the model names one.
        """
        if self.tokenizer.eos_token_id is None:
            reason = "neither the model's tokenizer nor its config names an end of text"
            if named := _named_ends(self.model):
                reason = f"the model's tokenizer has no token {named[0]}, its config's end of text"
            raise Refusal(
                f"{reason}, so answers would have no end; set eos_token in tokenizer_config.json, or "
                "eos_token_id in config.json."
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether greedy decoding gives it."""

        def ask() -> list[Any]:
            return super(SharedPrefixLM, self).loglikelihood(requests, disable_tqdm=disable_tqdm)

        return [(total, greedy) for total, greedy in self._answers("loglikelihood", requests, ask)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return each whole text's log-likelihood in nats.

        lm-eval puts BOS before a text. If the tokenizer did so too, the second would be predicted.
        """

        @mock.patch.object(self, "add_bos_token", False)
        def ask() -> list[Any]:
            return super(SharedPrefixLM, self).loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

        return self._answers("loglikelihood_rolling", requests, ask)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each prompt, up to a stop."""

        def ask() -> list[Any]:
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            self._check_token_ids(prompts)
            self._keep_prefix(map(tuple, prompts))
            return super(SharedPrefixLM, self).generate_until(requests, disable_tqdm=disable_tqdm)

        return self._answers("generate_until", requests, ask)

    def _check_token_ids(self, prompts: Iterable[list[int]]) -> None:
        """Refuse prompts with tokens that the model's embedding has no row for."""
        rows = self.model.get_input_embeddings().num_embeddings
        for ids in filter(None, prompts):
            check_token_ids(torch.tensor(ids), rows, "evaluation", self.tokenizer)

    def _answers(self, kind: str, requests: list[Instance], ask: Callable[[], list[Any]]) -> list[Any]:
        if self.kept_answers is None:
            return ask()
        return self.kept_answers.take(kind, [request.args for request in requests], ask)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether greedy decoding gives it.

        Args:
            requests: for each a name, the tokens of its context and those of its continuation.
            override_bs: rows a forward, in place of the batch size.

        Raises:
            Refusal: the model's embedding has no row for some token.
        """
        self._check_token_ids([*context, *continuation] for _, context, continuation in requests)
        rows: dict[LikelihoodRow, list[int]] = {}
        too_long = []  # lm-eval shortens these, with a warning
        for i, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) > self.max_length + 1:
                too_long.append(i)
            else:
                row = LikelihoodRow(tuple(context), (*context, *continuation[:-1]))
                rows.setdefault(row, []).append(i)
        questions = {row.context for row in rows}
        self._keep_prefix(questions)
        if self.batching != "padded" or (
            self._prefix_cache is None
            and (len(rows) == len(questions) or max(map(len, questions)) <= _SHORTEST_PREFIX)
        ):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        if too_long:
            shortened = super()._loglikelihood_tokens(
                [requests[i] for i in too_long], disable_tqdm, override_bs
            )
            answers.update(zip(too_long, shortened, strict=True))
        ordered = sorted(rows, key=lambda row: (-len(row.context), row))
        size = override_bs or self.batch_size
        bar = tqdm(total=len(requests), initial=len(too_long), disable=disable_tqdm, desc="Likelihoods")
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
        """Generate after `context` `[rows, tokens]`, padded on the left; return both, padding included."""
        blind = options.keys() <= _BLIND_TO_PADDING
        allowed: Batching = "equal lengths" if self.batching == "padded" and not blind else self.batching

        def generate(ids: Tensor, mask: Tensor, _: list[int]) -> Tensor:
            length = max_length - context.shape[1] + ids.shape[1]
            return self._generate_after_prefix(ids, length, stop, **options | {"attention_mask": mask})

        filler = self.tokenizer.pad_token_id
        return generate_rows(context, options["attention_mask"], filler, allowed, generate)

    def _generate_after_prefix(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Do as `_model_generate`, for rows that may share a forward; reuse the common prefix if possible."""
        mask, size = options["attention_mask"], len(self._prefix)
        pads = (context.shape[1] - mask.sum(1)).tolist()
        prompts = [tuple(row[pad:].tolist()) for row, pad in zip(context, pads, strict=True)]
        several = options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1
        if (
            self._prefix_cache is None
            or several
            # Padding would take up part of the window.
            or (any(pads) and not (counts_by_mask(self.model) and max_length <= _window(self._prefix_cache)))
            or any(len(prompt) <= size or prompt[:size] != self._prefix for prompt in prompts)
        ):
            return super()._model_generate(context, max_length, stop, **options)

        def prefix_first(rows: Tensor) -> Tensor:
            moved = [
                torch.cat([row[pad : pad + size], row[:pad], row[pad + size :]])
                for row, pad in zip(rows, pads, strict=True)
            ]
            return torch.stack(moved)

        options |= {
            "attention_mask": prefix_first(mask),
            "past_key_values": self._repeated_prefix(len(context)),
        }
        return super()._model_generate(prefix_first(context), max_length, stop, **options)

    def _keep_prefix(self, prompts: Iterable[TokenIds]) -> None:
        """Cache keys and values of the longest common prefix of `prompts`.

        At least one token of each is left.
        """
        distinct = sorted(set(prompts))
        self._prefix, self._prefix_cache = (), None
        if len(distinct) < 2 or self.batching != "padded":
            return
        room = min(map(len, distinct)) - 1
        # Of sorted prompts, the first and the last have the shortest prefix in common.
        common = _common(distinct[0], distinct[-1])[:room]
        if len(common) >= _SHORTEST_PREFIX:
            self._prefix, self._prefix_cache = common, self._forward([common], None, keep=1).past_key_values

    def _repeated_prefix(self, rows: int) -> Cache | None:
        """Return the cache of the common prefix, repeated for `rows` rows; None without a prefix."""
        cache = copy.deepcopy(self._prefix_cache)
        if cache is not None:
            cache.batch_repeat_interleave(rows)
        return cache

    def _log_probs(self, batch: Sequence[LikelihoodRow]) -> Iterator[Tensor]:
        """Yield log-probabilities `[tokens, vocabulary]` of the tokens after each row's context."""
        questions = list(dict.fromkeys(row.context for row in batch))
        cache, done = self._repeated_prefix(len(questions)), len(self._prefix)
        shared = min(map(len, questions)) - 1
        if len(questions) < len(batch) and shared - done >= _SHORTEST_PREFIX:
            cache = self._forward(
                [question[done:shared] for question in questions], cache, keep=1
            ).past_key_values
            done = shared
        if cache is not None:
            owners = [questions.index(row.context) for row in batch]
            cache.batch_select_indices(torch.tensor(owners, device=self.device))
        longest = max(len(row.tokens) for row in batch)
        padded = [(*row.tokens[done:], *[0] * (longest - len(row.tokens))) for row in batch]
        for row, logits in zip(batch, self._forward(padded, cache).logits, strict=True):
            predicting = logits[len(row.context) - 1 - done : len(row.tokens) - done]
            yield torch.log_softmax(predicting, -1, dtype=self.softmax_dtype)

    def _forward(self, rows: Sequence[TokenIds], cache: Cache | None, keep: int = 0) -> Any:
        """Run rows of one length after `cache`; return logits of the last `keep` tokens, 0 for all."""
        ids = torch.tensor(rows, device=self.device)
        with torch.no_grad():
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)


def _name_end(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Name the model's end of text in a tokenizer that names none."""
    if tokenizer.eos_token_id is not None:
        return
    for end in _named_ends(model):
        if (token := tokenizer.convert_ids_to_tokens(end)) is not None:
            tokenizer.eos_token = token
            return


def _named_ends(model: PreTrainedModel) -> list[int]:
    """Return the end of text that each config of the model names, the first if it names several."""
    configs = (model.generation_config, model.config.get_text_config())
    ends = [getattr(config, "eos_token_id", None) for config in configs]
    firsts = [end[0] if isinstance(end, list) and end else end for end in ends]
    return [end for end in firsts if isinstance(end, int)]


def _common(left: TokenIds, right: TokenIds) -> TokenIds:
    """Return the longest common prefix."""
    same = [a == b for a, b in zip(left, right, strict=False)]
    return left[: same.index(False)] if False in same else left[: len(same)]


def _score(log_probs: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Return a continuation's log-likelihood in nats, and whether each of its tokens is the likeliest."""
    target = torch.tensor(continuation, device=log_probs.device)
    predicted = log_probs[-len(continuation) :]
    return float(predicted.gather(1, target[:, None]).sum()), bool((predicted.argmax(-1) == target).all())


def _window(cache: Cache) -> int:
    """Return how many tokens the narrowest layer sees."""
    windows = (layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer))
    return min(windows, default=2**63)

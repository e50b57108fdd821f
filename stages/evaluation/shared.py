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
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from stages.core.errors import Refusal
from stages.core.lazy import mock
from stages.corpus.bos import begin, bos_tokens, closes
from stages.corpus.padding import (
    Batching,
    batching,
    counts_by_mask,
    generate_rows,
    reliable_length,
)
from stages.corpus.windows import check_token_ids
from stages.evaluation.room import fitting_rows
from stages.model.causal import check_causal
from stages.model.positions import most_tokens, sharing

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.evaluation.kept import KeptAnswers

_SHORTEST_PREFIX = 4
"""A common prefix shorter than this is not worth reusing."""
_ENCODED = 256
"""Requests whose texts are encoded together; their tokens are kept meanwhile."""
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


class Scored(NamedTuple):
    """What a batch of continuations scored, on the device until it is read."""

    totals: Tensor
    """The log-likelihood of each token, in nats."""
    likeliest: Tensor
    """Whether each token is the likeliest."""
    sizes: list[int]
    """Tokens of each continuation."""

    def read(self) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether all its tokens are the likeliest."""
        totals, likeliest = self.totals.cpu().split(self.sizes), self.likeliest.cpu().split(self.sizes)
        return [(float(each.sum()), bool(best.all())) for each, best in zip(totals, likeliest, strict=True)]


class SharedPrefixLM(HFLM):
    """HFLM without its repetition, called the same way.

    Args:
        options: those of HFLM.
        kept_answers: keeps the answers to finished tasks; None keeps none.
        memory: bytes that weights and rows share: fewer rows than the batch size run at once where more would
            not fit; None always runs that many.

    Raises:
        Refusal: the model looks ahead, so it has no likelihoods.
    """

    def __init__(
        self,
        *,
        pretrained: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kept_answers: KeptAnswers | None = None,
        memory: int | None = None,
        **options: Any,
    ) -> None:
        _name_end(tokenizer, pretrained)  # lm-eval would pad with a token that the model has not
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **options)
        # A checkpoint's own settings may sample, or penalize repetition: a suite says so, or nothing does.
        ends = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=ends)
        check_causal(self.model)
        self.batching = batching(self.model)
        for most in (most_tokens(self.model.config), reliable_length(self.model)):
            if most and most < self.max_length:
                self._max_length = most
        self._begin = bos_tokens(tokenizer, "auto") if closes(tokenizer) else None
        self._encoded: dict[str, list[int]] = {}
        self._pending: Iterator[Sequence[Instance]] = iter(())
        self._prefix: TokenIds = ()
        self._prefix_cache: Cache | None = None
        self.kept_answers = kept_answers
        self.memory = memory

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

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the tokens of a text, without the end of text that some tokenizers put after each."""
        if add_special_tokens is None and left_truncate_len is None and not options:
            if string not in self._encoded and (requests := next(self._pending, None)):
                self._encoded = self._encode_all(requests)
            if string in self._encoded:
                return self._encoded[string]
        if self._begin is None:
            return list(super().tok_encode(string, add_special_tokens, left_truncate_len, **options))
        ids = list(self.tokenizer.encode(string, add_special_tokens=False, **options))
        if add_special_tokens is not False and self.add_bos_token is not False:
            ids = begin(ids, self._begin)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_all(self, requests: Sequence[Instance]) -> dict[str, list[int]]:
        """Return the tokens of the texts that lm-eval encodes for these likelihoods, as `tok_encode` does.

        lm-eval encodes the context again for every choice, one text after the other. Here the tokenizer gets
        each text once and all of them together, to share out to its threads.
        """
        pairs = [(context, continuation) for context, continuation in (request.args for request in requests)]
        texts = dict.fromkeys(text for pair in pairs for text in ("".join(pair), pair[0].rstrip()))
        start = self.tokenizer.decode(self.prefix_token_id)
        encoded: dict[str, list[int]] = {}
        for begun in (False, True):
            if group := [text for text in texts if text.startswith(start) == begun]:
                adds = False if begun or self._begin is not None else self.add_bos_token
                special = {} if adds is None else {"add_special_tokens": adds}
                rows = self.tokenizer(group, **special).input_ids
                if self._begin is not None and self.add_bos_token is not False:
                    rows = [begin(row, self._begin) for row in rows]
                encoded.update(zip(group, rows, strict=True))
        return encoded

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and mask `[texts, tokens]`, int64, encoded as `tok_encode` does."""
        if self._begin is None:
            ids, mask = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
            return ids, mask
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether greedy decoding gives it."""

        def ask() -> list[Any]:
            parts = [requests[at : at + _ENCODED] for at in range(0, len(requests), _ENCODED)]
            with mock.patch.multiple(self, _pending=iter(parts), _encoded={}):
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
            answers = [
                int(normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"])
                for request in requests
            ]
            longest = min(self.max_length, max(map(len, prompts), default=0) + max(answers, default=0))
            rows = self.fitting(longest, longest - len(self._prefix), 1)
            with mock.patch.object(self, "batch_size_per_gpu", rows):
                return super(SharedPrefixLM, self).generate_until(requests, disable_tqdm=disable_tqdm)

        return self._answers("generate_until", requests, ask)

    def _check_token_ids(self, prompts: Iterable[Sequence[int]]) -> None:
        """Refuse prompts with tokens that the model's embedding has no row for."""
        rows = self.model.get_input_embeddings().num_embeddings
        highest = max(map(max, filter(None, prompts)), default=0)
        check_token_ids(torch.tensor([highest]), rows, "evaluation", self.tokenizer)

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
        rows: dict[LikelihoodRow, list[int]] = {}
        reads = self.max_length  # lm-eval looks into the config at each call
        too_long = []  # lm-eval shortens these, with a warning
        for i, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) > reads + 1:
                too_long.append(i)
            else:
                row = LikelihoodRow(tuple(context), (*context, *continuation[:-1]))
                rows.setdefault(row, []).append(i)
        questions = {row.context for row in rows}
        self._check_token_ids(questions)
        self._check_token_ids(requests[i][1] for i in too_long)
        self._check_token_ids(continuation for _, _, continuation in requests)
        self._keep_prefix(questions)
        if self.batching != "padded" or (
            self._prefix_cache is None
            and (len(rows) == len(questions) or max(map(len, questions)) <= _SHORTEST_PREFIX)
        ):
            return self._whole(requests, disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        if too_long:
            shortened = self._whole([requests[i] for i in too_long], disable_tqdm, override_bs)
            answers.update(zip(too_long, shortened, strict=True))
        ordered = sorted(rows, key=lambda row: (-len(row.context), row))
        longest = max(len(row.tokens) for row in ordered)
        new = longest - len(self._prefix)
        predicting = max(len(row.tokens) - len(row.context) for row in ordered) + 1
        spread = len(ordered[0].context) - len(ordered[-1].context)
        fitting = self.fitting(longest, new, min(new, predicting + spread))
        size = min(override_bs or fitting, fitting)
        bar = tqdm(total=len(requests), initial=len(too_long), disable=disable_tqdm, desc="Likelihoods")
        scored: list[tuple[list[int], Scored]] = []
        for first in range(0, len(ordered), size):
            batch = ordered[first : first + size]
            asked = [(place, i) for place, row in enumerate(batch) for i in rows[row]]
            scores = self._scores(batch, [(place, requests[i][2]) for place, i in asked])
            scored.append(([i for _, i in asked], scores))
            bar.update(len(asked))
        bar.close()
        for places, scores in scored:  # the device is waited for once all batches have been sent to it
            for i, score in zip(places, scores.read(), strict=True):
                answers[i] = score
                if (name := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", name, score)
        return [answers[i] for i in range(len(requests))]

    def _whole(self, requests: Any, disable_tqdm: bool, override_bs: int | None) -> list[tuple[float, bool]]:
        """Do as `_loglikelihood_tokens`, with nothing shared."""
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        longest = min(longest, self.max_length)
        fitting = self.fitting(longest, longest, longest)
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        if len(sharing(self.model.config, lengths)) > 1:
            fitting = 1  # a longer row would change the others
        with mock.patch.object(self, "batch_size_per_gpu", fitting):
            size = min(override_bs, fitting) if override_bs else None
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, size))

    def fitting(self, tokens: int, new: int, predicting: int) -> int:
        """Return the batch size, or as many rows as fit into memory; see `fitting_rows`."""
        if self.memory is None:
            return int(self.batch_size)
        fitting = fitting_rows(self.model, self.memory, tokens=tokens, new=new, predicting=predicting)
        return min(int(self.batch_size), fitting)

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
        if options.get("num_beams", 1) == options.get("num_return_sequences", 1) == 1:
            context, reused = self._after_prefix(context, options["attention_mask"], max_length)
            options |= reused
        return super()._model_generate(context, max_length, stop, **options)

    def _after_prefix(self, ids: Tensor, mask: Tensor, longest: int) -> tuple[Tensor, dict[str, Any]]:
        """Return prompts with the common prefix before their padding, and what `generate` needs to reuse it.

        Where it cannot be reused they stay as they are.

        Args:
            ids: prompts `[rows, tokens]`, padded on the left, which may share a forward.
            mask: `[rows, tokens]`, 0 for padding.
            longest: the most tokens of a row, padding and answer included.
        """
        size = len(self._prefix)
        pads = (ids.shape[1] - mask.sum(1)).tolist()
        prompts = [tuple(row[pad:].tolist()) for row, pad in zip(ids, pads, strict=True)]
        if (
            self._prefix_cache is None
            # Padding would take up part of the window.
            or (any(pads) and not (counts_by_mask(self.model) and longest <= _window(self._prefix_cache)))
            or any(len(prompt) <= size or prompt[:size] != self._prefix for prompt in prompts)
        ):
            return ids, {"attention_mask": mask}

        def prefix_first(rows: Tensor) -> Tensor:
            moved = [
                torch.cat([row[pad : pad + size], row[:pad], row[pad + size :]])
                for row, pad in zip(rows, pads, strict=True)
            ]
            return torch.stack(moved)

        cache = self._repeated_prefix(len(ids))
        return prefix_first(ids), {"attention_mask": prefix_first(mask), "past_key_values": cache}

    def _keep_prefix(self, prompts: Iterable[TokenIds]) -> None:
        """Cache keys and values of the longest common prefix of `prompts`.

        At least one token of each is left. Prompts that the model cannot read whole are cut later, from the
        left, and share nothing.
        """
        distinct = sorted({prompt for prompt in prompts if len(prompt) <= self.max_length})
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

    def _scores(self, batch: Sequence[LikelihoodRow], asked: Sequence[tuple[int, Sequence[int]]]) -> Scored:
        """Return the log-likelihood in nats of each continuation, and whether each token is the likeliest.

        The device is not waited for.

        Args:
            batch: the rows to run.
            asked: the place of a row in the batch, and a continuation that it holds.
        """
        first = min(len(row.context) for row in batch) - 1
        # A row's context predicts the first token of a continuation. Continuations share what predicts them.
        predicted = [
            ((place, len(batch[place].context) - 1 - first + offset), token)
            for place, continuation in asked
            for offset, token in enumerate(continuation)
        ]
        distinct = {at: number for number, at in enumerate(dict.fromkeys(at for at, _ in predicted))}
        row, position = self._sent(list(distinct)).T
        at, token = self._sent([(distinct[at], token) for at, token in predicted]).T
        log_probs = torch.log_softmax(self._logits(batch)[row, position], -1, dtype=self.softmax_dtype)
        sizes = [len(continuation) for _, continuation in asked]
        return Scored(log_probs[at, token], log_probs.argmax(-1)[at] == token, sizes)

    def _sent(self, values: Sequence[Any]) -> Tensor:
        """Return integers on the model's device, int64, without waiting for what it computes."""
        tensor = torch.tensor(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _logits(self, batch: Sequence[LikelihoodRow]) -> Tensor:
        """Return logits `[rows, tokens, vocabulary]` of a batch.

        Only tokens from the last of the shortest context on have logits, as no others are asked for.
        """
        questions = list(dict.fromkeys(row.context for row in batch))
        cache, done = self._repeated_prefix(len(questions)), len(self._prefix)
        shortest = min(map(len, questions)) - 1
        if len(questions) < len(batch):
            if shortest - done >= _SHORTEST_PREFIX:
                cache = self._forward(
                    [question[done:shortest] for question in questions], cache, keep=1
                ).past_key_values
                done = shortest
            if cache is not None:
                owners = [questions.index(row.context) for row in batch]
                cache.batch_select_indices(self._sent(owners))
        longest = max(len(row.tokens) for row in batch)
        padded = [(*row.tokens[done:], *[0] * (longest - len(row.tokens))) for row in batch]
        logits: Tensor = self._forward(padded, cache, keep=longest - shortest).logits
        return logits

    def _forward(self, rows: Sequence[TokenIds], cache: Cache | None, keep: int = 0) -> Any:
        """Run rows of one length after `cache`; return logits of the last `keep` tokens, 0 for all."""
        with torch.no_grad():
            return self.model(
                input_ids=self._sent(rows), past_key_values=cache, use_cache=True, logits_to_keep=keep
            )


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


def _window(cache: Cache) -> int:
    """Return how many tokens the narrowest layer sees."""
    windows = (layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer))
    return min(windows, default=2**63)

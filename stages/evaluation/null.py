"""Responders without knowledge as models that lm-eval can ask; see `stages.controls.responders`."""

from __future__ import annotations

import math
import random
import sys
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from stages.controls.responders import SCORERS, SPEAKERS

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

ANSWER_TOKENS = 256
"""Longest answer in tokens where a task sets no bound; lm-eval's default for every model."""


class NullLM(LM):
    """A scorer and a speaker in one, with the tokenizer and chat template of a model.

    The text of a request that is not one of several choices gets the likelihood of tokens drawn uniformly
    from the vocabulary.
    """

    max_length = sys.maxsize

    def __init__(self, scorer: str, speaker: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._scorer, self._speaker, self._seed = scorer, speaker, seed
        self._last_turns: dict[str, str] = {}
        """The text of the last turn, by prompt."""

    @classmethod
    def named(cls, responder: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> NullLM:
        """Return the responder of this name: a silent scorer, or a speaker that scores as `uniform` does."""
        scorer = responder if responder in SCORERS else "uniform"
        return cls(scorer, responder if responder in SPEAKERS else "empty", tokenizer, seed)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        """Return the tokens of `text` without special ones."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt that any model gets; speakers see its last turn, without the template."""
        prompt = str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
        self._last_turns[prompt] = chat_history[-1]["content"]
        return prompt

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return log-likelihoods in nats, each with False: greedy decoding never gives the text.

        Ties between choices are broken in a random order: lm-eval takes the first, which in some tasks is
        right.
        """
        items: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            items.setdefault((request.task_name, request.doc_id), []).append(i)
        likelihoods = [0.0] * len(requests)
        for (task, item), places in items.items():
            texts = ["".join(requests[i].args) for i in places]
            if len(places) == 1:
                (place,) = places
                likelihoods[place] = self._of_tokens(len(self.tok_encode(requests[place].args[1])))
                continue
            order = self._draw(task, item).sample(range(len(places)), len(places))
            longest = max(map(len, texts))
            for i, text, rank in zip(places, texts, order, strict=True):
                loses = self._scorer == "longest-choice" and len(text) < longest
                likelihoods[i] = -math.log(len(places)) - 1e-6 * rank - 100 * loses
        return [(value, False) for value in likelihoods]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return log-likelihoods of whole texts in nats."""
        return [self._of_tokens(len(self.tok_encode(request.args[0]))) for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [(self._of_tokens(len(continuation)), False) for _, _, continuation in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the speaker's texts, cut where a task cuts any answer."""
        answers = []
        for request in requests:
            prompt, options = request.args
            draw = self._draw(request.task_name, request.doc_id)
            text = SPEAKERS[self._speaker](self._last_turns.get(prompt, prompt), draw)
            longest = options.get("max_gen_toks", ANSWER_TOKENS)
            if len(ids := self.tok_encode(text)) > longest:
                text = self.tokenizer.decode(ids[:longest])
            stops = options.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers

    def _of_tokens(self, count: int) -> float:
        return -count * math.log(len(self.tokenizer))

    def _draw(self, *item: Any) -> random.Random:
        return random.Random(repr((self._seed, *item)))


def for_readouts(readouts: set[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[NullLM]:
    """Return the fewest responders that include every scorer, and every speaker if text is generated."""
    speakers = list(SPEAKERS) if "generation" in readouts else ["empty"] * len(SCORERS)
    return [NullLM(SCORERS[i % len(SCORERS)], speaker, tokenizer, seed) for i, speaker in enumerate(speakers)]

"""Budget forcing: the length of thinking before an answer is set from outside (s1, 2501.19393).

Thinking is text between `begin` and `end`, generated before the answer. It has an upper bound: after `budget`
tokens it is cut, the end of thinking and a request for the answer are appended, and the model answers. A
model that ended by itself is not asked for its answer again, unless `answer_when` says so. Thinking has a
lower bound too: where thinking would end earlier, the end is removed and "Wait" appended, up to `waits`
times, and the model goes on thinking. So accuracy is measured at every length of thinking, not only at the
model's own.

Smaller budgets cut the thoughts of the largest, so budgets differ in length alone, and a sweep of them
thinks only once. Tokens are drawn by inverting the cumulative distribution at numbers that depend on the
seed, the draw and the prompt; neither the batch nor the order of prompts changes them.

The answer is the text after thinking; the task sees nothing else. Tokens count where the model generated
them: all of its thinking, across every "Wait", and its answer. Appended text does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.numbers import generator
from stages.corpus.padding import Batching, generate_rows
from stages.corpus.sampling import Sampled, Stopped, stopped_at
from stages.evaluation.shared import SharedPrefixLM
from stages.evaluation.thinking.settings import Thinking

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class Stretch(NamedTuple):
    """Thinking up to an end or a "Wait": the generated tokens, and their text without the end."""

    tokens: tuple[int, ...]
    text: str


class Reply(NamedTuple):
    """The thinking and the answer that were generated for a prompt."""

    thinking: str
    thinking_tokens: int
    ended: bool
    """Whether thinking ended by itself, within the budget and with no wait left."""
    answer: str
    answer_tokens: int


class BudgetLM(SharedPrefixLM):
    """A model that thinks before it answers; set `budget` and `draw` before asking it.

    Args:
        seed: seeds all draws.
        penalties: options of `generate`.
        options: those of `SharedPrefixLM`.
    """

    def __init__(
        self,
        thinking: Thinking,
        seed: int,
        penalties: Mapping[str, float] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.thinking, self.penalties = thinking, penalties
        self.budget = thinking.budgets[-1]
        self.draw = 0
        self.replies: dict[str, Reply] = {}
        """The replies to the last requests, by prompt."""
        self.bar = tqdm(disable=True)
        """Thoughts and answers of all draws, see `watched`."""
        self._due = 0
        self._seed = seed
        self._thoughts: dict[tuple[int, str], list[Stretch]] = {}
        """The thoughts at the largest budget, by draw and prompt."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each prompt; a request's settings other than `until` and length are ignored.

        Raises:
            Refusal: a prompt, its thinking and its answer are longer than the model reads.
        """

        def ask() -> list[Any]:
            limits = {request.args[0]: self._limits(request.args[1]) for request in requests}
            self._think(list(limits), max(longest for _, longest in limits.values()))
            replies: dict[str, Reply] = {}
            for limit, prompts in groupby(sorted(limits, key=limits.__getitem__), key=limits.__getitem__):
                replies |= self._answer(list(prompts), *limit)
            return [replies[request.args[0]] for request in requests]

        key = [self.thinking.model_dump(), self.budget, self.draw, [request.args for request in requests]]
        replies = self.kept_answers.take("thinking", key, ask) if self.kept_answers else ask()
        self.replies = {
            request.args[0]: Reply(*reply) for request, reply in zip(requests, replies, strict=True)
        }
        # Kept answers, and thoughts that needed no other stretch, were not counted one by one.
        prompts = len({request.args[0] for request in requests})
        self._due += prompts * (1 + self._stretches * (self.budget == self.thinking.budgets[0]))
        self.bar.update(self._due - self.bar.n)
        return [self.replies[request.args[0]].answer for request in requests]

    @contextmanager
    def watched(self, items: int) -> Iterator[None]:
        """Show one bar over all draws of so many items, which ask the smallest budget first."""
        steps = self._stretches + len(self.thinking.budgets)
        total, self._due = items * self.thinking.draws * steps, 0
        with tqdm(total=total, desc="Thinking and answers") as self.bar:
            yield

    @property
    def _stretches(self) -> int:
        """The most stretches that a thought has."""
        return self.thinking.waits + 1 if self.thinking.budgets[-1] else 0

    def _limits(self, settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Return the stops of an answer and its longest length in tokens."""
        limits = normalize_gen_kwargs(settings, self.max_gen_toks)
        return tuple(stop for stop in limits["until"] if stop), int(limits["max_gen_toks"])

    def _think(self, prompts: list[str], longest: int) -> None:
        """Think, at the largest budget, about prompts that this draw has not thought about.

        Args:
            longest: tokens of an answer, for which room must be left.
        """
        rules, budget = self.thinking, self.thinking.budgets[-1]
        reserve = len(self.tok_encode(rules.end + rules.answer)) + longest
        going = [prompt for prompt in prompts if (self.draw, prompt) not in self._thoughts]
        for prompt in going:
            self._thoughts[self.draw, prompt] = []
        for _ in range(self._stretches):
            done = {prompt: _length(self._thoughts[self.draw, prompt]) for prompt in going}
            stretches = self._generate(
                [
                    prompt + rules.begin + self._text(self._thoughts[self.draw, prompt], True)
                    for prompt in going
                ],
                [self.numbers_of(prompt, "thinking", budget)[done[prompt] :] for prompt in going],
                (rules.end,),
                reserve,
            )
            for prompt, tokens in zip(going, stretches, strict=True):
                text = self._decoded(tokens).split(rules.end)[0]
                self._thoughts[self.draw, prompt].append(Stretch(tokens, text))
            going = [prompt for prompt in going if _length(self._thoughts[self.draw, prompt]) < budget]
            if not going:
                break

    def _answer(self, prompts: list[str], until: tuple[str, ...], longest: int) -> dict[str, Reply]:
        """Answer prompts that were thought about, at this budget."""
        rules = self.thinking
        thoughts = [self._cut(self._thoughts[self.draw, prompt]) for prompt in prompts]
        texts = [self._text(thought, False) for thought in thoughts]
        ends = [
            self._is_whole(thought, self._thoughts[self.draw, prompt])
            for prompt, thought in zip(prompts, thoughts, strict=True)
        ]
        answers = self._generate(
            [
                f"{prompt}{rules.begin}{text}{rules.end}{rules.request(ended=ended)}"
                for prompt, text, ended in zip(prompts, texts, ends, strict=True)
            ],
            [self.numbers_of(prompt, "answer", longest) for prompt in prompts],
            until,
        )
        replies = {}
        rows = zip(prompts, thoughts, texts, ends, answers, strict=True)
        for prompt, thought, text, ended, tokens in rows:
            answer = self._decoded(tokens, skip_special_tokens=True)
            for stop in until:
                answer = answer.split(stop)[0]
            replies[prompt] = Reply(text, _length(thought), ended, answer, len(tokens))
        return replies

    def _is_whole(self, thought: list[Stretch], whole: list[Stretch]) -> bool:
        """Tell whether a thought ended by itself, with no wait left, and was not cut."""
        return len(whole) == self.thinking.waits + 1 and thought == whole and self._ended(whole[-1])

    def _cut(self, whole: list[Stretch]) -> list[Stretch]:
        """Return the first `budget` tokens of a thought."""
        left, kept = self.budget, []
        for stretch in whole:
            if left <= 0:
                break
            if len(stretch.tokens) > left:
                tokens = stretch.tokens[:left]
                stretch = Stretch(tokens, self._decoded(tokens).split(self.thinking.end)[0])
            kept.append(stretch)
            left -= len(stretch.tokens)
        return kept

    def _text(self, thought: list[Stretch], goes_on: bool) -> str:
        """Return a thought's text, with a "Wait" between stretches, and after the last if it goes on."""
        text = self.thinking.wait.join(stretch.text for stretch in thought)
        return text + self.thinking.wait if goes_on and thought else text

    def _ended(self, stretch: Stretch) -> bool:
        """Tell whether the model ended a stretch, rather than the budget."""
        return stretch.tokens[-1] in self._eos() or self.thinking.end in self._raw(stretch.tokens)

    def numbers_of(self, prompt: str, purpose: str, count: int) -> Tensor:
        """Return the `count` numbers in [0, 1), float64, that decide which tokens are drawn."""
        draw = generator(repr((self._seed, self.draw, purpose, prompt)), size=8)
        return torch.rand(count, generator=draw, dtype=torch.float64)

    def _generate(
        self,
        texts: list[str],
        numbers: list[Tensor],
        stops: tuple[str, ...],
        reserve: int = 0,
    ) -> list[tuple[int, ...]]:
        """Return the tokens after each text, up to and with a stop, or as many as it has numbers.

        Args:
            numbers: a tensor a text, see `numbers_of`.
            stops: end a text, like its own end of text.
            reserve: tokens that must still fit after these.
        """
        generated: list[tuple[int, ...]] = [()] * len(texts)
        longest_first = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
        self._keep_prefix(tuple(self.tok_encode(text)) for text in texts)
        prompts = (len(self.tok_encode(texts[i])) for i in longest_first[: self.batch_size])
        tokens = max(prompts, default=0) + max(map(len, numbers), default=0)
        size = self.fitting(tokens, tokens, 1)
        for first in range(0, len(longest_first), size):
            batch = longest_first[first : first + size]
            rows = self._generate_batch(
                [texts[i] for i in batch], [numbers[i] for i in batch], stops, reserve
            )
            for i, row in zip(batch, rows, strict=True):
                ends = [place for place, token in enumerate(row) if token in self._eos()]
                row = row[: ends[0] + 1] if ends else row
                generated[i] = tuple(row[: stopped_at(row, stops, self._raw)])
                self.bar.update(min(1, (self.bar.total or 1) - self.bar.n))  # kept answers counted thoughts
        return generated

    def _generate_batch(
        self, texts: list[str], numbers: list[Tensor], stops: tuple[str, ...], reserve: int
    ) -> list[list[int]]:
        """Return the tokens after each text, at most as many as it has numbers; some may follow a stop."""
        ids, mask = self.tok_batch_encode(texts)
        start = ids.shape[1]
        limits = [len(row) for row in numbers]
        if (over := start + max(limits) + reserve - self.max_length) > 0:
            raise Refusal(
                f"a prompt of {start} tokens, {max(limits)} to be generated and {reserve} for the answer are "
                f"{over} more than the {self.max_length} that the model reads; lower thinking.budgets, shots "
                "or max_gen_toks."
            )

        def generate(ids: Tensor, mask: Tensor, places: list[int]) -> Tensor:
            start = ids.shape[1]
            chosen, most = [numbers[place] for place in places], [limits[place] for place in places]
            ids, reused = self._after_prefix(
                ids.to(self.device), mask.to(self.device), start + max(most) + reserve
            )
            out: Tensor = self.model.generate(
                input_ids=ids,
                max_new_tokens=max(most),
                do_sample=False,
                logits_processor=[Sampled(start, chosen, self.thinking.temperature, _check_logits)],
                stopping_criteria=[Stopped(start, most, stops, self._raw)],
                eos_token_id=self._eos(),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **reused,
                **self.penalties,
            )
            return out.cpu()

        allowed: Batching = "equal lengths" if self.batching == "padded" and self.penalties else self.batching
        with torch.no_grad():
            out = generate_rows(ids, mask, self.tokenizer.pad_token_id, allowed, generate)
        return [row[:limit] for row, limit in zip(out[:, start:].tolist(), limits, strict=True)]

    def _eos(self) -> list[int]:
        """Return the tokens that end a text."""
        ids = self.model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return sorted({self.eot_token_id, *(token for token in ids if token is not None)})

    def _raw(self, tokens: Sequence[int]) -> str:
        return str(self.tok_decode(list(tokens), skip_special_tokens=False))

    def _decoded(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of generated tokens without the end of text."""
        kept = [token for token in tokens if token not in self._eos()]
        return str(self.tok_decode(kept, skip_special_tokens=skip_special_tokens))


def _check_logits(logits: Tensor) -> None:
    if logits.isnan().any():
        raise Refusal("the model's logits are NaN, so it cannot generate; check its recipe.")


def _length(thought: Sequence[Stretch]) -> int:
    """Return the tokens of a thought."""
    return sum(len(stretch.tokens) for stretch in thought)

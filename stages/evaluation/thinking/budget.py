"""Budget forcing: how long a model thinks before it answers is set from outside.

Thinking is text between `begin` and `end`, generated before the answer. At most: after `budget` tokens it is
cut, the end of thinking and a request for the answer are appended, and the model answers. At least: where it
would end before that, the end is taken away and "Wait" appended, up to `waits` times, and it goes on thinking
(s1, 2501.19393). So accuracy is measured at every length of thinking, and not only at the model's own.

Smaller budgets cut what the largest one thought: budgets differ in length alone, and a sweep of them costs
one thinking. Tokens are drawn by inverting the cumulative distribution at numbers that depend on the seed,
the draw and the prompt, so neither the batch nor the order decides on which numbers are used.

An answer is what comes after thinking; the task sees nothing else. Tokens are counted where the model
generated them: all of its thinking, over every "Wait", and its answer. What was appended is not counted.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, StoppingCriteria

from stages.core.errors import Refusal
from stages.core.numbers import generator, sample
from stages.evaluation.shared import SharedPrefixLM
from stages.evaluation.thinking.settings import Thinking

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class Stretch(NamedTuple):
    """What is thought up to an end or a "Wait": the tokens generated, and their text without the end."""

    tokens: tuple[int, ...]
    text: str


class Reply(NamedTuple):
    """What the model generated for a prompt."""

    thinking: str
    thinking_tokens: int
    ended: bool
    """Whether thinking ended by itself, within the budget and with no wait left."""
    answer: str
    answer_tokens: int


class BudgetLM(SharedPrefixLM):
    """A model that thinks before it answers, as long as its `budget` and what its `draw`, both set, say."""

    def __init__(self, thinking: Thinking, seed: int, **options: Any) -> None:
        """The `options` are those of `SharedPrefixLM`; `seed` is that of all draws."""
        super().__init__(**options)
        self.thinking = thinking
        self.budget = thinking.budgets[-1]
        self.draw = 0
        self.replies: dict[str, Reply] = {}
        """What the last requests were answered with, by prompt."""
        self._seed = seed
        self._thoughts: dict[tuple[int, str], list[Stretch]] = {}

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """The answer to each request's prompt; of its settings only `until` and the longest answer are used.

        Raises:
            Refusal: a prompt, what is thought and an answer are more than the model reads.
        """

        def ask() -> list[Any]:
            wanted = {request.args[0]: self._limits(request.args[1]) for request in requests}
            self._think(list(wanted), max(longest for _, longest in wanted.values()), disable_tqdm)
            replies: dict[str, Reply] = {}
            for limits, group in groupby(sorted(wanted, key=wanted.__getitem__), key=wanted.__getitem__):
                replies |= self._answer(list(group), *limits, disable_tqdm)
            return [replies[request.args[0]] for request in requests]

        asked = [self.thinking.model_dump(), self.budget, self.draw, [request.args for request in requests]]
        found = self.finished.take("thinking", asked, ask) if self.finished else ask()
        self.replies = {
            request.args[0]: Reply(*reply) for request, reply in zip(requests, found, strict=True)
        }
        return [self.replies[request.args[0]].answer for request in requests]

    def _limits(self, settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        asked = normalize_gen_kwargs(settings, self.max_gen_toks)
        return tuple(one for one in asked["until"] if one), int(asked["max_gen_toks"])

    def _think(self, prompts: list[str], longest: int, quiet: bool) -> None:
        """Think about prompts that were not thought about in this draw, at the largest budget.

        Args:
            longest: tokens of an answer, for which room must be left.
        """
        rules, budget = self.thinking, self.thinking.budgets[-1]
        reserve = len(self.tok_encode(rules.end + rules.answer)) + longest
        going = [one for one in prompts if (self.draw, one) not in self._thoughts]
        for prompt in going:
            self._thoughts[self.draw, prompt] = []
        for _ in range(rules.waits + 1 if budget else 0):
            done = {prompt: _tokens(self._thoughts[self.draw, prompt]) for prompt in going}
            found = self._generate(
                [
                    prompt + rules.begin + self._text(self._thoughts[self.draw, prompt], True)
                    for prompt in going
                ],
                [self._numbers(prompt, "thinking", budget)[done[prompt] :] for prompt in going],
                (rules.end,),
                None if quiet else "Thinking",
                reserve,
            )
            for prompt, tokens in zip(going, found, strict=True):
                text = self._said(tokens).split(rules.end)[0]
                self._thoughts[self.draw, prompt].append(Stretch(tokens, text))
            going = [p for p in going if _tokens(self._thoughts[self.draw, p]) < budget]
            if not going:
                break

    def _answer(
        self, prompts: list[str], until: tuple[str, ...], longest: int, quiet: bool
    ) -> dict[str, Reply]:
        rules = self.thinking
        thoughts = [self._cut(self._thoughts[self.draw, prompt]) for prompt in prompts]
        told = [self._text(thought, False) for thought in thoughts]
        found = self._generate(
            [
                f"{prompt}{rules.begin}{text}{rules.end}{rules.answer}"
                for prompt, text in zip(prompts, told, strict=True)
            ],
            [self._numbers(prompt, "answer", longest) for prompt in prompts],
            until,
            None if quiet else "Answers",
        )
        replies = {}
        for prompt, thought, text, tokens in zip(prompts, thoughts, told, found, strict=True):
            said = self._said(tokens, skip_special_tokens=True)
            for stop in until:
                said = said.split(stop)[0]
            whole = self._thoughts[self.draw, prompt]
            ended = len(whole) == rules.waits + 1 and thought == whole and self._ends(whole[-1])
            replies[prompt] = Reply(text, _tokens(thought), ended, said, len(tokens))
        return replies

    def _cut(self, whole: list[Stretch]) -> list[Stretch]:
        """The first `budget` tokens of a thought."""
        left, kept = self.budget, []
        for stretch in whole:
            if left <= 0:
                break
            if len(stretch.tokens) > left:
                tokens = stretch.tokens[:left]
                stretch = Stretch(tokens, self._said(tokens).split(self.thinking.end)[0])
            kept.append(stretch)
            left -= len(stretch.tokens)
        return kept

    def _text(self, thought: list[Stretch], goes_on: bool) -> str:
        """A thought's text, a "Wait" between its stretches, and after the last where it goes on."""
        text = self.thinking.wait.join(stretch.text for stretch in thought)
        return text + self.thinking.wait if goes_on and thought else text

    def _ends(self, stretch: Stretch) -> bool:
        """Whether the model ended it, and not the budget."""
        return stretch.tokens[-1] in self._eos() or self.thinking.end in self._raw(stretch.tokens)

    def _numbers(self, prompt: str, what: str, count: int) -> Tensor:
        """`count` numbers in [0, 1), float64, that decide on what is drawn."""
        draw = generator(repr((self._seed, self.draw, what, prompt)), size=8)
        return torch.rand(count, generator=draw, dtype=torch.float64)

    def _generate(
        self,
        texts: list[str],
        numbers: list[Tensor],
        stops: tuple[str, ...],
        told: str | None,
        reserve: int = 0,
    ) -> list[tuple[int, ...]]:
        """The tokens that follow each text: as many as it has numbers, or up to and with a stop.

        Args:
            numbers: that decide on what is drawn, float64, a tensor a text.
            stops: what ends a text beside its own end.
            told: the name of the progress bar; None shows none.
            reserve: tokens that must still fit after these.
        """
        made: list[tuple[int, ...]] = [()] * len(texts)
        longest_first = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
        bar = tqdm(total=len(texts), disable=told is None, desc=told)
        for first in range(0, len(longest_first), self.batch_size):
            batch = longest_first[first : first + self.batch_size]
            ids, mask = self.tok_batch_encode([texts[i] for i in batch])
            limits = [len(numbers[i]) for i in batch]
            if (over := ids.shape[1] + max(limits) + reserve - self.max_length) > 0:
                raise Refusal(
                    f"a prompt of {ids.shape[1]} tokens, {max(limits)} to be generated and {reserve} for the "
                    f"answer are {over} more than the {self.max_length} that the model reads; lower "
                    "thinking.budgets, shots or max_gen_toks."
                )
            start = ids.shape[1]
            temperature = self.thinking.temperature
            drawn = _Drawn(start, [numbers[i] for i in batch], temperature)
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    max_new_tokens=max(limits),
                    do_sample=False,
                    logits_processor=[drawn],
                    stopping_criteria=[_Stopped(start, limits, stops, self._raw)],
                    eos_token_id=self._eos(),
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=True,
                )
            for i, row, limit in zip(batch, out[:, start:].tolist(), limits, strict=True):
                row = row[:limit]
                ends = [place for place, token in enumerate(row) if token in self._eos()]
                row = row[: ends[0] + 1] if ends else row
                made[i] = tuple(row[: _stop(row, stops, self._raw)])
                bar.update(1)
        bar.close()
        return made

    def _eos(self) -> list[int]:
        given = self.model.generation_config.eos_token_id
        ids = given if isinstance(given, list) else [given]
        return sorted({self.eot_token_id, *(one for one in ids if one is not None)})

    def _raw(self, tokens: Sequence[int]) -> str:
        return str(self.tok_decode(list(tokens), skip_special_tokens=False))

    def _said(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of generated tokens without the end of text."""
        kept = [token for token in tokens if token not in self._eos()]
        return str(self.tok_decode(kept, skip_special_tokens=skip_special_tokens))


class _Drawn(LogitsProcessor):
    """Greedy decoding turned into sampling: only the token that the row's next number falls on is left."""

    def __init__(self, start: int, numbers: list[Tensor], temperature: float) -> None:
        self.start, self.numbers, self.temperature = start, numbers, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `[rows, vocabulary]` with all but one entry of each row at minus infinity."""
        if scores.isnan().any():
            raise Refusal("the model's logits are not numbers, so nothing can be generated from it.")
        if self.temperature == 0:
            return scores
        step = input_ids.shape[1] - self.start
        # A row that has used up its numbers is finished; what comes after is cut off.
        at = [float(row[step]) if step < len(row) else 0.0 for row in self.numbers]
        place = sample(scores, torch.tensor(at, dtype=torch.float64), self.temperature)
        others = torch.arange(scores.shape[1]) != place
        return torch.zeros_like(scores).masked_fill(others.to(scores.device), -torch.inf)


class _Stopped(StoppingCriteria):
    """Which rows have said a stop or are as long as they may be."""

    def __init__(
        self, start: int, limits: list[int], stops: tuple[str, ...], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.start, self.limits, self.stops, self.decode = start, limits, stops, decode
        self.tail = max((len(stop.encode()) for stop in stops), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        length = input_ids.shape[1] - self.start
        # A token has a byte at least, so a stop that ends now lies in the last tokens.
        tails = input_ids[:, -min(self.tail, length) :].tolist()
        done = [
            length >= limit or any(stop in said for stop in self.stops)
            for limit, said in zip(self.limits, map(self.decode, tails), strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


def _stop(row: Sequence[int], stops: tuple[str, ...], decode: Callable[[Sequence[int]], str]) -> int:
    """How many of the row's tokens there are up to its first stop, the stop included."""
    if not any(stop in decode(row) for stop in stops):
        return len(row)
    low, high = 1, len(row)
    while low < high:
        middle = (low + high) // 2
        if any(stop in decode(row[:middle]) for stop in stops):
            high = middle
        else:
            low = middle + 1
    return low


def _tokens(thought: Sequence[Stretch]) -> int:
    return sum(len(stretch.tokens) for stretch in thought)

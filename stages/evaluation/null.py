"""Responders that know nothing, as lm-eval asks a model: what they score is the floor of a task.

A score means what it has over the best of them. Checkers of instructions are pleased by a lone full stop
where all an instruction forbids is commas, a longest choice is right more often than chance, and
TruthfulQA-MC2 gives a scorer of equal odds 0.46. So the floor is measured on the very items, not assumed.

A scorer answers likelihoods: `uniform` gives all choices of an item the same odds, `longest-choice` prefers
the longest. Equal odds are parted by a drawn order, for lm-eval takes the first of equal choices and some
tasks have the right one there. Text that is not one choice of several has a uniform scorer's likelihood of
its tokens, the vocabulary's size the odds of each. A speaker answers in words: nothing, a full stop, `the`
300 times, the prompt again, the question's own words but the first in a drawn order (of "Sort b, a:" the a
and the b, as who knows what to work on and not how), the last word of the example before the question (as who
knows how an answer looks), 300 words drawn at random. Scorers are silent, speakers score as `uniform` does.
"""

import math
import random
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from stages.corpus.readings import words

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

LENGTH = 300
"""Words of a long answer."""
LONGEST = 256
"""Tokens of an answer where its task sets no bound, as for any model of lm-eval."""
WORDS = (
    "air", "animal", "answer", "book", "boy", "change", "city", "country", "day", "earth", "end", "eye",
    "family", "farm", "father", "field", "fish", "food", "form", "garden", "girl", "ground", "hand", "head",
    "help", "hill", "home", "horse", "house", "idea", "island", "king", "land", "letter", "life", "light",
    "line", "man", "moon", "mother", "mountain", "name", "night", "number", "page", "paper", "part", "people",
    "picture", "place", "plant", "play", "point", "river", "road", "room", "school", "sea", "sentence",
    "side", "sound", "star", "state", "story", "summer", "sun", "table", "thing", "time", "tree", "turn",
    "voice", "water", "way", "wind", "woman", "wood", "word", "world", "year",
)  # fmt: skip

Say = Callable[[str, random.Random], str]


def _shuffled(prompt: str, draw: random.Random) -> list[str]:
    """The words of the prompt's last line that has any, but the first, in a drawn order."""
    lines = [found for line in prompt.splitlines() if (found := words(line))]
    mentioned = lines[-1][1:] if lines else []
    return draw.sample(mentioned, len(mentioned))


def _previous(prompt: str) -> str:
    """The last word of the line before the last of those that have any."""
    lines = [line for line in prompt.splitlines() if line.strip()]
    return lines[-2].split()[-1] if len(lines) > 1 else ""


SPEAKERS: dict[str, Say] = {
    "empty": lambda prompt, draw: "",
    "dot": lambda prompt, draw: ".",
    "repeat": lambda prompt, draw: " ".join(["the"] * LENGTH),
    "echo": lambda prompt, draw: prompt.strip(),
    "shuffled": lambda prompt, draw: " ".join(_shuffled(prompt, draw)),
    "previous": lambda prompt, draw: _previous(prompt),
    "random-words": lambda prompt, draw: " ".join(draw.choices(WORDS, k=LENGTH)),
}
SCORERS = ("uniform", "longest-choice")


class NullLM(LM):
    """A scorer and a speaker in one, with the tokenizer and template of the model they stand beside."""

    max_length = sys.maxsize

    def __init__(self, scorer: str, speaker: str, tokenizer: "PreTrainedTokenizerBase", seed: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._scorer, self._speaker, self._seed = scorer, speaker, seed
        self._asked: dict[str, str] = {}

    @classmethod
    def named(cls, responder: str, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "NullLM":
        """The responder of this name."""
        scorer = responder if responder in SCORERS else "uniform"
        return cls(scorer, responder if responder in SPEAKERS else "empty", tokenizer, seed)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        """Tokens of `text`, none of them special."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt any model gets; an echo is of what its last turn says, without the template."""
        prompt = str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
        self._asked[prompt] = chat_history[-1]["content"]
        return prompt

    def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
        """In nats, and never what greedy decoding would give."""
        items: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            items.setdefault((request.task_name, request.doc_id), []).append(i)
        found = [0.0] * len(requests)
        for (task, item), places in items.items():
            texts = ["".join(requests[i].args) for i in places]
            if len(places) == 1:
                found[places[0]] = self._of_tokens(len(self.tok_encode(requests[places[0]].args[1])))
                continue
            order = self._draw(task, item).sample(range(len(places)), len(places))
            longest = max(map(len, texts))
            for i, text, rank in zip(places, texts, order, strict=True):
                loses = self._scorer == "longest-choice" and len(text) < longest
                found[i] = -math.log(len(places)) - 1e-6 * rank - 100 * loses
        return [(value, False) for value in found]

    def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
        """In nats, of whole texts."""
        return [self._of_tokens(len(self.tok_encode(request.args[0]))) for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [(self._of_tokens(len(continuation)), False) for _, _, continuation in requests]

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """What the speaker says, cut where a task cuts any answer."""
        answers = []
        for request in requests:
            prompt, options = request.args
            draw = self._draw(request.task_name, request.doc_id)
            text = SPEAKERS[self._speaker](self._asked.get(prompt, prompt), draw)
            if len(ids := self.tok_encode(text)) > (most := options.get("max_gen_toks", LONGEST)):
                text = self.tokenizer.decode(ids[:most])
            stops = options.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers

    def _of_tokens(self, count: int) -> float:
        return -count * math.log(len(self.tokenizer))

    def _draw(self, *item: Any) -> random.Random:
        return random.Random(repr((self._seed, *item)))


def for_readouts(readouts: set[str], tokenizer: "PreTrainedTokenizerBase", seed: int) -> list[NullLM]:
    """As few as answer in every way: all scorers, and all speakers where text is asked for."""
    speakers = list(SPEAKERS) if "generation" in readouts else ["empty"] * len(SCORERS)
    return [NullLM(SCORERS[i % len(SCORERS)], name, tokenizer, seed) for i, name in enumerate(speakers)]

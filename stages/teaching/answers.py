"""A model's own answers to a data set's questions, to train its compressed descendants on.

Targets that the dense model would itself have given ask a compressed one to become what it was, not to learn
another style on the way; recovery is then less confounded with new knowledge. The answers are made once and
kept as the tokens that were generated, so that nothing is lost in writing them down and reading them again.

Generation is transformers' own, with a cache of keys, prompts padded on the left. An answer ends with the
end of text, before `until`, or after `max_new_tokens`; the end of text is part of it in the first two cases,
so a student learns to end where its teacher does. With `shots` the teacher sees solved examples before each
question, which a model that was not made to answer needs; its students see the question alone.

At a temperature above 0 a token is the first at which the cumulative probability exceeds a uniform number;
the numbers are drawn on the CPU, a row of them a question, so that neither the device nor the batch size
decides which are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Seed
from stages.corpus.examples import end_of_text, few_shot, prompt, questions
from stages.corpus.rows import example
from stages.corpus.taught import Graded, Lesson
from stages.teaching.teaching import Teaching

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


COLDEST = 1e-6
"""The lowest temperature that logits can be divided by."""


class Answers(Teaching):
    """Questions of a data set, answered by the teacher."""

    method: Literal["answers"]
    max_new_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the logits before a token is drawn; 0 takes the likeliest."""
    until: Annotated[str, Field(min_length=1)] | None = None
    """What an answer ends before, such as a line break where answers are of one line."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Few-shot examples, a line each, that the teacher sees before a question. Of graded data sets only."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 0 < self.temperature < COLDEST:
            raise ValueError(
                f"temperature must be 0, which takes the likeliest token, or {COLDEST:f} or more"
            )
        if self.shots and self.chat_template:
            raise ValueError("shots are lines of text before a question, not turns of a chat; leave one out")
        if self.completion is not None:
            raise ValueError("method answers makes the answers itself; leave completion out")
        return self

    def teach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Lesson:
        """The questions with the model's answers as what is predicted.

        Raises:
            Refusal: the data set has too few questions, they and an answer are longer than the model reads,
                its logits are not numbers, or it answers nothing.
        """
        from stages.teaching.decoding import Until, generated

        learned, held_out = questions(self)
        asked = learned + held_out
        given = [prompt(one.prompt, self.chat_template, tokenizer) for one in asked]
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in given]
        head = few_shot(self.dataset, self.shots)
        shown = [tokenizer.encode(head + text, add_special_tokens=False) for text in given]
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, shown)) + self.max_new_tokens
        if limit is not None and longest > limit:
            raise Refusal(
                f"data set {self.dataset}: a question and max_new_tokens make {longest} tokens, "
                f"{self.source} reads {limit} at most; lower max_new_tokens"
                f"{' or shots' if self.shots else ''}."
            )
        draw = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand(len(prompts), self.max_new_tokens, generator=draw, dtype=torch.float64)
        ends = _ends(model, tokenizer)
        said: list[list[int]] = []
        for at in tqdm(range(0, len(prompts), self.batch_size), desc="answering", unit="batch"):
            part = slice(at, at + self.batch_size)
            ended = Until(tokenizer, self.until)
            said += generated(model, shown[part], uniform[part], self.temperature, ends, ended)
        finished = [finished_answer(one, ends, self.until, tokenizer) for one in said]
        if not any(tokenizer.decode(one, skip_special_tokens=True).strip() for one in finished):
            raise Refusal(f"{self.source} answers none of the questions of {self.dataset} with any text.")
        made = [
            Graded(example(torch.tensor(before + after), len(before)), one.difficulty)
            for before, after, one in zip(prompts, finished, asked, strict=True)
        ]
        cut = sum(one[-1] not in ends for one in finished)
        return Lesson(made[: len(learned)], made[len(learned) :], {"cut_at_max_new_tokens": cut})


def finished_answer(
    said: list[int], ends: list[int], until: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """`said` to where it ends, the end of text included; all of it where it does not."""
    for count, token in enumerate(said):
        if token in ends:
            return said[: count + 1]
        if until and (at := tokenizer.decode(said[: count + 1]).find(until)) >= 0:
            whole = max(size for size in range(count + 1) if len(tokenizer.decode(said[:size])) <= at)
            return [*said[:whole], ends[0]]
    return said


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end of text, and what else the checkpoint stops at, a chat's end of turn."""
    config = model.generation_config
    stops = (config.eos_token_id if config is not None else None) or []
    return list(dict.fromkeys([end_of_text(tokenizer), *([stops] if isinstance(stops, int) else stops)]))

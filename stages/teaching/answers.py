"""A model's own answers to a data set's questions, to train its compressed descendants on.

Targets written by the dense model ask a compressed one to become what it was, not to learn another style
along the way, so recovery is less confounded with new knowledge. The answers are generated once and stored as
the generated tokens, so nothing is lost by decoding and encoding them.

transformers generates, with a cache of keys and prompts padded on the left. An answer ends with the end of
text, before `until`, or after `max_new_tokens`. In the first two cases the end of text is part of it, so a
student learns to end where its teacher does. With `shots` the teacher sees solved examples before each
question, which a model without instruction tuning needs; its students see the question alone.

At a temperature above 0, a token is the first at which the cumulative probability exceeds a uniform number.
The numbers are drawn on the CPU, a row per question, so neither the device nor the batch size decides which
are used. `top_p` leaves out the unlikely tokens (nucleus sampling, 1904.09751).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Seed
from stages.corpus.bos import begin, bos_tokens
from stages.corpus.examples import choose_questions, few_shot_text, prompt_text
from stages.corpus.rows import example
from stages.corpus.taught import GradedExample, Lesson
from stages.corpus.windows import check_token_ids
from stages.model.positions import most_tokens
from stages.teaching.teaching import Teaching

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOWEST_TEMPERATURE = 1e-6
"""The lowest temperature that logits can be divided by."""


class Answers(Teaching):
    """Questions of a data set, answered by the teacher."""

    method: Literal["answers"]
    max_new_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the logits before a token is drawn; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens whose probabilities together reach this share; 1 draws among all."""
    until: Annotated[str, Field(min_length=1)] | None = None
    """Text before which an answer ends, such as a line break for answers of one line."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Few-shot examples, one per line, that the teacher sees before a question. Only for graded data sets."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 0 < self.temperature < _LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0, which takes the likeliest token, or at least {_LOWEST_TEMPERATURE:f}"
            )
        if self.top_p < 1 and not self.temperature:
            raise ValueError(
                f"top_p {self.top_p:g} needs a temperature above 0, as temperature 0 draws nothing; give one "
                "or remove top_p"
            )
        if self.shots and self.chat_template:
            raise ValueError(
                "shots are lines of text before a question, not turns of a chat; remove one of the two"
            )
        if self.completion is not None:
            raise ValueError("method answers generates the answers itself; remove completion")
        return self

    def teach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Lesson:
        """Return the questions with the model's answers, which are predicted.

        Raises:
            Refusal: the data set has too few questions, a question and its answer exceed the model's context,
                a token has no row in its embedding, its logits are not finite, or all its answers are empty.
        """
        # This module needs base classes of transformers.
        from stages.corpus.decoding import end_ids, generate_answers

        learned, held_out = choose_questions(self)
        questions = learned + held_out
        texts = [prompt_text(question.prompt, self.chat_template, tokenizer) for question in questions]
        bos = bos_tokens(tokenizer, self.bos)
        prompts = [begin(tokenizer.encode(text, add_special_tokens=False), bos) for text in texts]
        shots = few_shot_text(self.dataset, self.shots)
        shown = [begin(tokenizer.encode(shots + text, add_special_tokens=False), bos) for text in texts]
        config = model.config.get_text_config()
        limit = most_tokens(config)
        longest = max(map(len, shown)) + self.max_new_tokens
        if limit is not None and longest > limit:
            raise Refusal(
                f"data set {self.dataset}: a question and max_new_tokens take {longest} tokens, but "
                f"{self.source} reads at most {limit}; lower max_new_tokens"
                f"{' or shots' if self.shots else ''}."
            )
        ends = end_ids(model, tokenizer)
        ids = torch.tensor([token for prompt in [*shown, ends[:1]] for token in prompt])
        check_token_ids(ids, config.vocab_size, f"data set {self.dataset}", tokenizer)
        draw = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand(len(prompts), self.max_new_tokens, generator=draw, dtype=torch.float64)
        generated: list[list[int]] = []
        for at in tqdm(range(0, len(prompts), self.batch_size), desc="answering", unit="batch"):
            part = slice(at, at + self.batch_size)
            generated += generate_answers(
                model, shown[part], uniform[part], self.temperature, ends, self.until, tokenizer, self.top_p
            )
        answers = [cut_answer(tokens, ends, self.until, tokenizer) for tokens in generated]
        if not any(tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers):
            raise Refusal(
                f"every answer of {self.source} to the questions of {self.dataset} is empty; use another "
                "source, or give shots."
            )
        examples = [
            GradedExample(example(torch.tensor(prompt + answer), len(prompt)), question.difficulty)
            for prompt, answer, question in zip(prompts, answers, questions, strict=True)
        ]
        cut = sum(answer[-1] not in ends for answer in answers)
        return Lesson(examples[: len(learned)], examples[len(learned) :], {"cut_at_max_new_tokens": cut})


def cut_answer(
    tokens: list[int], ends: list[int], until: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Cut `tokens` after the end of text, or before `until`, where an end of text is added."""
    for count, token in enumerate(tokens):
        if token in ends:
            return tokens[: count + 1]
        if until and (at := tokenizer.decode(tokens[: count + 1]).find(until)) >= 0:
            whole = max(size for size in range(count + 1) if len(tokenizer.decode(tokens[:size])) <= at)
            return [*tokens[:whole], ends[0]]
    return tokens

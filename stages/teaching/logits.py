"""A teacher's next-token distributions on a data set, computed once for all students.

Distillation needs the teacher's distributions at every step. They never change, so they are stored in place
of the teacher: the `top` likeliest tokens at every predicted one with their log-probabilities, and that of
all other tokens together (see `stages.recovery.objective`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import no_grad
from stages.corpus.examples import choose_examples
from stages.corpus.rows import TopLogits, collate
from stages.corpus.taught import GradedExample, Lesson
from stages.recovery.objective import predictions
from stages.teaching.teaching import Teaching

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Logits(Teaching):
    """Examples of a data set, with the teacher's likeliest tokens at each predicted one."""

    method: Literal["logits"]
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a window, BOS included; questions and answers keep their lengths."""
    top: Annotated[int, Field(ge=1)] | None = 64
    """Tokens kept of each distribution, eight bytes each; null keeps the whole vocabulary."""

    @no_grad
    def teach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Lesson:
        """Return the examples, those to train on with a teacher.

        Raises:
            Refusal: the data set has too few examples, they do not fit the model, or its logits are not
                finite.
        """
        learned, held_out = choose_examples(self, self.sequence_length, tokenizer, model.config)
        taught: list[GradedExample] = []
        for at in tqdm(range(0, len(learned), self.batch_size), desc="teaching", unit="batch"):
            part = learned[at : at + self.batch_size]
            logits, _ = predictions(model, collate([(item.example,) for item in part]))
            if not logits.isfinite().all():
                raise Refusal(f"the logits of {self.source} are not finite; use another source.")
            logits = logits[:, : len(tokenizer)]  # columns beyond are padding of the layer, not tokens
            sizes = [collate([(item.example,)]).predicted for item in part]
            for item, rows in zip(part, logits.split(sizes), strict=True):
                taught.append(
                    replace(item, example=replace(item.example, teacher=top_logits(rows, self.top)))
                )
        return Lesson(
            taught, [replace(item, example=replace(item.example, teacher=None)) for item in held_out]
        )


def top_logits(logits: Tensor, top: int | None) -> TopLogits:
    """Return the `top` likeliest tokens of `[n, vocabulary]` fp32 logits, on the CPU; all tokens for None."""
    count = min(top or logits.shape[1], logits.shape[1])
    values, tokens = logits.topk(count)
    if count < logits.shape[1]:
        rest = logits.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
        values = torch.cat([values, rest], 1)
    return TopLogits(tokens.cpu(), (values - logits.logsumexp(1, keepdim=True)).cpu())

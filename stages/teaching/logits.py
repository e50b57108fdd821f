"""A teacher's next-token distributions on a data set, computed once for all who learn from them.

Distillation asks at every step what the teacher thinks of the tokens at hand. Its answer never changes, so
it is kept instead of the teacher: the `top` likeliest tokens of every predicted one with their
log-probabilities, and that of all others together (see `stages.recovery.objective`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import no_grad
from stages.corpus.examples import choose
from stages.corpus.rows import TopLogits, collate
from stages.corpus.taught import Graded, Lesson
from stages.recovery.objective import predictions
from stages.teaching.teaching import Teaching

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Logits(Teaching):
    """Examples of a data set as they are, and the teacher's likeliest tokens beside each predicted one."""

    method: Literal["logits"]
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a window; questions and answers have the length they have."""
    top: Annotated[int, Field(ge=1)] | None = 64
    """Tokens kept of each distribution, eight bytes each; null keeps the whole vocabulary."""

    @no_grad
    def teach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Lesson:
        """The examples, those to train on with a teacher.

        Raises:
            Refusal: the data set has too few examples, they are longer than the model reads, or its logits
                are not numbers.
        """
        learned, held_out = choose(self, self.sequence_length, tokenizer, model.config)
        taught: list[Graded] = []
        for at in tqdm(range(0, len(learned), self.batch_size), desc="teaching", unit="batch"):
            part = learned[at : at + self.batch_size]
            batches = [collate([(one.example,)]) for one in part]
            logits, _ = predictions(model, collate([(one.example,) for one in part]))
            if not logits.isfinite().all():
                raise Refusal(f"the logits of {self.source} are not finite numbers; take another teacher.")
            logits = logits[:, : len(tokenizer)]  # rows beyond, which fill a layer up, are no tokens
            sizes = [one.predicted for one in batches]
            for one, rows in zip(part, logits.split(sizes), strict=True):
                taught.append(replace(one, example=replace(one.example, teacher=likeliest(rows, self.top))))
        return Lesson(taught, [replace(one, example=replace(one.example, teacher=None)) for one in held_out])


def likeliest(logits: Tensor, top: int | None) -> TopLogits:
    """What is kept of `[n, vocabulary]` fp32 logits, on the CPU."""
    count = min(top or logits.shape[1], logits.shape[1])
    values, tokens = logits.topk(count)
    if count < logits.shape[1]:
        rest = logits.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
        values = torch.cat([values, rest], 1)
    return TopLogits(tokens.cpu(), (values - logits.logsumexp(1, keepdim=True)).cpu())

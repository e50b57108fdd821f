"""The likeliest tokens at every position of a text, from which the report takes the divergence from the base.

Perplexity looks at one token a position. Two models with the same perplexity may still predict differently,
and KL divergence of the predictions sees a smaller change with fewer tokens (2407.09141). Each candidate
keeps its own `top` likeliest tokens, so the base is computed once, and a change in how they are compared
(`stages.reporting.divergence`) runs no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.core.lazy import torch
from stages.core.schema import Strict
from stages.core.tables import Likeliest

if TYPE_CHECKING:
    from torch import nn


class Divergence(Strict):
    """How many tokens are kept; eight bytes each a position."""

    top: Annotated[int, Field(ge=1)] = 32

    def likeliest(
        self, model: nn.Module, rows: list[list[int]], first: int, batch_size: int
    ) -> list[Likeliest]:
        """Return what `model` predicts in each row, from the token at `first` on.

        Args:
            rows: token ids of equal length.
        """
        kept: list[Likeliest] = []
        ids = torch.tensor(rows)
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in ids.split(batch_size):
                logits = model(input_ids=batch[:, :-1].to(device), use_cache=False).logits
                kept += [self._of_row(*pair, first) for pair in zip(batch, logits, strict=True)]
        return kept

    def _of_row(self, row: torch.Tensor, logits: torch.Tensor, first: int) -> Likeliest:
        """Return the likeliest tokens of a row `[tokens]`, from logits `[tokens - 1, vocabulary]`."""
        logs = torch.log_softmax(logits[first - 1 :].float(), dim=-1)
        target = logs.gather(1, row[first:, None].to(logs.device))[:, 0]
        values, ids = logs.topk(min(self.top, logs.shape[1]), dim=-1)
        # Logits of 16 bits tie often; equal ones stand in the order of their ids.
        order = ids.argsort(dim=-1)
        values, ids = values.gather(1, order), ids.gather(1, order)
        order = values.argsort(dim=-1, descending=True, stable=True)
        sides = (row[first:], target, ids.gather(1, order), values.gather(1, order))
        return Likeliest(*(side.cpu().numpy() for side in sides))

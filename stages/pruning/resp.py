"""Pruning by what moves the model's own words, after RESP (2512.02185).

A reasoning model is used on long text that it writes itself. So it is calibrated on that: the model goes on
from the beginnings of calibration windows, and a weight's importance is |w * gradient| of the loss on the
generated tokens alone; prompts are read and not predicted. Pruning changes what the model says, so it goes
in steps, each of which begins by generating anew with the model pruned so far. A pruned weight stays so.

The paper prunes coupled structures; here the same importance ranks single weights, within each output row
or each matrix. The whole model is in memory beside the sums of its gradients in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.core.lazy import torch
from stages.core.numbers import count_of
from stages.core.schema import Sparsity
from stages.corpus.windows import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RESP(WholeModel):
    """Zero the share `sparsity` of every linear, in `steps` between which the model generates anew."""

    method: Literal["resp"]
    sparsity: Sparsity
    steps: Annotated[int, Field(ge=1)] = 5
    """Equal shares of the target, one a step."""
    scope: Literal["row", "matrix"]
    """Weights are compared within an output row, or within a linear."""
    calibration: Tokens
    """`tokens: generated`; one seed for all steps, which draw one after another."""

    @model_validator(mode="after")
    def _self_generated(self) -> Self:
        if self.calibration.tokens != "generated":
            raise ValueError(
                f"calibration.tokens is {self.calibration.tokens}, and resp learns from what the model says; "
                "write tokens: generated"
            )
        return self

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Prune every linear in steps."""
        from stages.model.blocks import linears
        from stages.model.checkpoint import zero_masks

        zeros = zero_masks(linears(model, self.ignore))
        return Change(zeros, self.prune(model, context.tokenizer))

    def prune(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Prune `model` in place; returns what is noted: each step's sparsity and the loss it began with.

        Raises:
            Refusal: windows are too few or too long, or came out alike; a loss or gradient is not finite.
        """
        from stages.compress.select import lowest
        from stages.compress.statistics import DeadInputs
        from stages.corpus.generation import generated
        from stages.corpus.windows import text_windows
        from stages.model.blocks import linears
        from stages.pruning.gradients import loss_gradients

        assert self.calibration.seed is not None and self.calibration.prompt_length is not None
        found = linears(model, self.ignore)
        texts = text_windows(tokenizer, self.calibration)
        draw = torch.Generator().manual_seed(self.calibration.seed)
        size = sum(one.weight.numel() for one in found)
        dead = DeadInputs("the first to go", "get no gradient from the generated tokens")
        told = []
        for step in range(1, self.steps + 1):
            windows = generated(model, tokenizer, self.calibration, texts, draw)
            gradients, loss = loss_gradients(
                model, found, windows, prompt_length=self.calibration.prompt_length, label=f"resp step {step}"
            )
            zeros = 0
            for one in found:
                gradient = gradients.pop(one.name)
                dead.tell(one.name, (gradient == 0).all(0))
                scores = (one.weight.float() * gradient).abs()
                count = count_of(self.sparsity * step / self.steps, one.weight.numel())
                gone = one.weight == 0
                mask = lowest(scores.__getitem__, gone, count, by_row=self.scope == "row")
                one.weight.masked_fill_(mask, 0)
                zeros += int(mask.sum())
            told.append({"sparsity": zeros / size, "loss": loss})
        return {"steps": told}

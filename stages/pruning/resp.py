"""Pruning by the gradients on the model's own words, after RESP (2512.02185).

A reasoning model is used on long text that it writes itself, so it is calibrated on such text: the model
continues the beginnings of calibration windows, and the importance of a weight is |w * gradient| of the loss
on the generated tokens only; prompts are read but not predicted. Pruning changes what the model writes, so it
goes in steps, and each step generates again with the model as pruned so far. A pruned weight stays zero.

The paper prunes coupled structures (`stages.pruning.shape.reflective`); here the same importance ranks single
weights, within each output row or each matrix. The whole model is in memory, and the sums of its gradients in
fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.compress.select import extend_mask
from stages.compress.statistics import DeadInputs
from stages.core.lazy import torch
from stages.core.numbers import count_of
from stages.core.schema import Sparsity
from stages.corpus.generation import generate_windows
from stages.corpus.windows import Tokens, text_windows
from stages.model.blocks import embedding_rows, linears
from stages.pruning.gradients import loss_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RESP(WholeModel):
    """Zero the share `sparsity` of every linear in `steps`, generating calibration text before each step."""

    method: Literal["resp"]
    sparsity: Sparsity
    steps: Annotated[int, Field(ge=1)] = 5
    """The number of steps, each of which adds the same share of the target."""
    scope: Literal["row", "matrix"]
    """Whether weights are compared within an output row or within a linear."""
    calibration: Tokens
    """`tokens: generated`; all steps draw from one generator with its seed."""

    @model_validator(mode="after")
    def _self_generated(self) -> Self:
        if self.calibration.tokens != "generated":
            raise ValueError(
                f"calibration.tokens is {self.calibration.tokens}, but resp is calibrated on text the model "
                "writes; set tokens: generated"
            )
        return self

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Prune every linear in steps."""
        from stages.model.checkpoint import zero_masks

        zeros = zero_masks(linears(model, self.ignore))
        return Change(zeros, self.prune(model, context.tokenizer))

    def prune(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Prune `model` in place and return notes: for each step its sparsity and the loss before it.

        Raises:
            Refusal: windows are too few, too long or not distinct; a loss or gradient is not finite.
        """
        assert self.calibration.seed is not None and self.calibration.prompt_length is not None
        targets = linears(model, self.ignore)
        texts = text_windows(tokenizer, self.calibration, embedding_rows(model))
        draw = torch.Generator().manual_seed(self.calibration.seed)
        size = sum(linear.weight.numel() for linear in targets)
        dead = DeadInputs("the first to go", "get no gradient from the generated tokens")
        steps = []
        for step in range(1, self.steps + 1):
            windows = generate_windows(model, tokenizer, self.calibration, texts, draw)
            gradients, loss = loss_gradients(
                model,
                targets,
                windows,
                prompt_length=self.calibration.prompt_length,
                label=f"resp step {step}",
            )
            zeros = 0
            for linear in targets:
                gradient = gradients.pop(linear.name)
                dead.log(linear.name, (gradient == 0).all(0))
                scores = (linear.weight.float() * gradient).abs()
                count = count_of(self.sparsity * step / self.steps, linear.weight.numel())
                gone = linear.weight == 0
                mask = extend_mask(scores.__getitem__, gone, count, by_row=self.scope == "row")
                linear.weight.masked_fill_(mask, 0)
                zeros += int(mask.sum())
            steps.append({"sparsity": zeros / size, "loss": loss})
        return {"steps": steps}

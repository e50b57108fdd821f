"""Structured pruning by the gradients on the model's own words: RESP as published (2512.02185).

As in `stages.pruning.resp`, a model that reasons is calibrated on text that it writes itself, only generated
tokens count, and the text is generated again before every step by the model as pruned so far. What goes are
coupled structures: a neuron of an MLP with its rows of gate and up and its column of down, or a group of
attention heads with its rows of q, k and v and its columns of o. The importance of a structure is the sum of
|w * gradient| over all its weights.

While steps go on, a structure is off by a zero column (or columns) of down or o; at the end it is cut out, so
the checkpoint is smaller and plain. For that every block keeps the same numbers. The authors instead rank all
blocks together, by masks that no config can describe, and leave the keys and values of grouped queries alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.core.lazy import torch
from stages.core.numbers import count_of
from stages.core.schema import Sparsity
from stages.corpus.generation import generate_windows
from stages.corpus.windows import Tokens, text_windows
from stages.model.blocks import embedding_rows, linears
from stages.pruning.gradients import loss_gradients
from stages.pruning.shape.anatomy import Part, attentions, mlps
from stages.pruning.shape.attention import NO_FEWER, HeadLayout, cut_heads, head_settings, layout_of
from stages.pruning.shape.neurons import cut_neurons, width_setting
from stages.pruning.shape.shrink import Cuts, cut, shrink
from stages.pruning.shape.shrinker import count_left

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["neurons", "heads"]


@dataclass
class Structures:
    """The structures of one kind in every block."""

    kind: Kind
    parts: dict[str, Part]
    """By the full name of their block."""
    count: int
    """Structures in a block."""
    left: int
    """Structures that remain in a block."""
    scores: dict[str, Tensor]
    """`[count]` fp32 by block; -1 is off."""

    def measure(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum |w * gradient| over the weights of every structure that is on.

        Args:
            gradients: `[out, in]` fp32 by the full name of a linear.
        """
        for name, part in self.parts.items():
            moved = {
                linear.name: (linear.weight.float() * gradients[linear.name]).abs()
                for linear in (*part.readers, part.writer)
            }
            total = moved[part.writer.name].sum(0).view(self.count, -1).sum(1)
            for reader in part.readers:
                total = total + moved[reader.name].sum(1).view(self.count, -1).sum(1)
            self.scores[name] = total.masked_fill(self.scores[name] < 0, -1)

    def switch_off(self, count: int) -> None:
        """Zero the output of the `count` structures of each block with the lowest scores."""
        for name, part in self.parts.items():
            lowest = self.scores[name].sort(stable=True).indices[:count]
            self.scores[name][lowest] = -1
            off = (self.scores[name] < 0).repeat_interleave(part.width // self.count)
            part.writer.weight.masked_fill_(off, 0)


class ReflectiveStructures(WholeModel):
    """Remove the share `sparsity` of neurons and of head groups in `steps`, generating text before each."""

    reshapes: ClassVar[bool] = True
    method: Literal["resp-structures"]
    sparsity: Sparsity
    """The share of structures of each kind; the number kept is rounded up."""
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("neurons", "heads")
    """What is removed."""
    steps: Annotated[int, Field(ge=1)] = 5
    """The number of steps, each of which adds the same share of the target."""
    calibration: Tokens
    """`tokens: generated`; all steps draw from one generator with its seed."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.ignore:
            raise ValueError("ignore must be left out: a matrix cannot keep its size alone")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds lists {self.kinds[0]} twice; list it once")
        if self.calibration.tokens != "generated":
            raise ValueError(
                f"calibration.tokens is {self.calibration.tokens}, but resp-structures is calibrated on text "
                "the model writes; set tokens: generated"
            )
        return self

    @property
    def refuses(self) -> Mapping[str, str]:
        """Families in which the size of a head is the hidden size over the number of heads."""
        reason = f"{NO_FEWER}; set kinds: [neurons]"
        return dict.fromkeys(("opt", "gpt_neox", "gpt2"), reason) if "heads" in self.kinds else {}

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Remove structures in steps."""
        from stages.model.checkpoint import zero_masks

        zeros = zero_masks(linears(model))
        structures = self.structures(model)
        self.plan(model, structures)  # refused before any work
        steps = self.prune(model, context.tokenizer, structures)
        cuts, settings, notes = self.plan(model, structures)
        shrink(model, cuts, settings)
        kept = {name: cut(mask, f"{name}.weight", cuts) for name, mask in zeros.items()}
        return Change(kept, {"steps": steps, **notes})

    def structures(self, model: PreTrainedModel) -> list[Structures]:
        """Return the structures of every kind, none of them off.

        Raises:
            Refusal: the family has no such structures, or less than one of them would go.
        """
        made = []
        for kind in self.kinds:
            parts = mlps(model) if kind == "neurons" else attentions(model)
            first = next(iter(parts.values()))
            count = first.width if kind == "neurons" else layout_of(model, first).groups
            left = count_left(count, self.sparsity, "neurons" if kind == "neurons" else "groups of heads")
            scores = {name: torch.zeros(count, device=model.device) for name in parts}
            made.append(Structures(kind, parts, count, left, scores))
        return made

    def plan(
        self, model: PreTrainedModel, structures: list[Structures]
    ) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
        """Return the cuts, the config's new numbers, and facts for the record.

        Raises:
            Refusal: the family's config cannot describe what is left.
        """
        cuts: Cuts = {}
        settings: dict[str, int] = {}
        notes: dict[str, Any] = {}
        for each in structures:
            if each.left == each.count:
                continue
            if each.kind == "neurons":
                mine = cut_neurons(each.parts, each.scores, each.left)
                settings |= width_setting(model, mine, each.count, each.left)
                notes["width"] = {"before": each.count, "after": each.left}
            else:
                before = layout_of(model, next(iter(each.parts.values())))
                after = HeadLayout(each.left * before.shared, each.left, before.size)
                mine, kept = cut_heads(model, each.parts, each.scores, before, after, "groups")
                settings |= head_settings(model, after)
                notes["heads"] = {"before": before.queries, "after": after.queries, "kept": kept}
            cuts |= mine
        return cuts, settings, notes

    def prune(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, structures: list[Structures]
    ) -> list[dict[str, Any]]:
        """Switch structures off in steps; return for each step the loss before it and what is left.

        Raises:
            Refusal: windows are too few, too long or not distinct; a loss or gradient is not finite.
        """
        assert self.calibration.seed is not None and self.calibration.prompt_length is not None
        targets = linears(model)
        texts = text_windows(tokenizer, self.calibration, embedding_rows(model))
        draw = torch.Generator().manual_seed(self.calibration.seed)
        steps = []
        for step in range(1, self.steps + 1):
            windows = generate_windows(model, tokenizer, self.calibration, texts, draw)
            gradients, loss = loss_gradients(
                model,
                targets,
                windows,
                prompt_length=self.calibration.prompt_length,
                label=f"resp-structures step {step}",
            )
            left: dict[str, int] = {}
            for each in structures:
                each.measure(gradients)
                gone = count_of((each.count - each.left) * step / self.steps / each.count, each.count)
                each.switch_off(gone)
                left[each.kind] = each.count - gone
            steps.append({"loss": loss, **left})
        return steps

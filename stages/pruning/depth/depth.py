"""Depth pruning: whole blocks go, those whose absence is felt least; or their attention alone.

What is left is a smaller plain checkpoint, blocks closed up and renumbered (`stages.pruning.depth.remove`). Which
blocks go is the metric's choice (`stages.pruning.depth.rank` has the formulas and papers). A checkpoint cannot
leave an attention out, so target `attention` zeroes its output projection: the artifact says so, and its
sparsity counts those zeros. Instead of nothing a removed block can leave its mean update on the
calibration text behind, x -> x + E f(x) (2407.16286), in the bias of the block before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import NoData, Seed
from stages.corpus.windows import Tokens
from stages.pruning.depth.tasks import Asked, Items

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.pruning.depth.rank import Ranking


class Batches(Tokens):
    """The tokens blocks are judged on, some windows at a time."""

    batch_size: Annotated[int, Field(ge=1)] = 4
    """Windows run at a time."""


def _kind(value: Any) -> str:
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    if "shots" in given:
        return "items"
    none = given.get("dataset") == "none" and given.get("tokens", "text") == "text"
    return "no-data" if none else "tokens"


Judged = Annotated[
    Annotated[Batches, Tag("tokens")] | Annotated[Items, Tag("items")] | Annotated[NoData, Tag("no-data")],
    Discriminator(_kind),
]
"""Tokens; for greedy also graded items (with `shots`); none where nothing is read."""


class Depth(WholeModel):
    """Remove `blocks` blocks, or the attention of as many."""

    method: Literal["depth"]
    metric: Literal["block-influence", "angular", "reverse", "perplexity", "shapley", "greedy"]
    """What the blocks that go are chosen by; `angular` removes a contiguous run."""
    blocks: Annotated[int, Field(ge=1)]
    target: Literal["block", "attention"] = "block"
    keep: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Numbers of blocks never removed. greedy keeps block 0 besides, reverse the last one."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Orders drawn for shapley; each costs as many forwards as there are blocks."""
    seed: Seed | None = None
    """Of these draws; null takes `run.seed`."""
    replace_by_mean: bool = False
    """Leave a removed block's mean update behind, where a family has a bias to hold it."""
    calibration: Judged

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.ignore:
            raise ValueError("depth removes whole blocks and ignores no matrix; name blocks in keep instead")
        if len(set(self.keep)) < len(self.keep):
            raise ValueError(f"keep names a block twice: {list(self.keep)}; name it once")
        if self.metric == "shapley" and self.samples is None:
            raise ValueError("metric shapley needs samples, the number of orders drawn, such as 32")
        if self.metric != "shapley" and not (self.samples is None and self.seed is None):
            raise ValueError(f"metric {self.metric} draws nothing; leave samples and seed out")
        if self.metric == "angular" and self.target == "attention":
            raise ValueError("metric angular compares runs of blocks; take another for target attention")
        if self.replace_by_mean and self.target == "block" and 0 not in self.keep:
            raise ValueError("replace_by_mean needs a block before each removed one; add 0 to keep")
        reads = self.metric != "reverse" or self.replace_by_mean
        if reads and isinstance(self.calibration, NoData):
            what = "replace_by_mean" if self.metric == "reverse" else f"metric {self.metric}"
            raise ValueError(f"{what} is measured on text; name one to calibrate")
        if not reads and not isinstance(self.calibration, NoData):
            raise ValueError("calibration must be {dataset: none}, as nothing here reads text")
        if isinstance(self.calibration, Items) and (self.metric != "greedy" or self.replace_by_mean):
            raise ValueError(
                "graded items serve metric greedy without replace_by_mean; calibrate on a text instead"
            )
        return self

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Remove blocks, or zero their attention."""
        from stages.model.blocks import linears
        from stages.model.checkpoint import zero_masks
        from stages.pruning.depth import mean

        data: Tensor | Asked | None = None
        if isinstance(self.calibration, Batches):
            data = context.windows()
        elif isinstance(self.calibration, Items):
            data = self.calibration.asked(context.tokenizer)
        if self.replace_by_mean:
            mean.check(model, self.target)
        ranking = self.rank(model, data, context.seed)
        means: dict[int, Tensor] = {}
        if self.replace_by_mean:
            assert isinstance(self.calibration, Batches) and isinstance(data, torch.Tensor)
            means = mean.updates(model, data, self.calibration.batch_size, self.target)
        done = self._remove(model, ranking.removed, means)
        notes = {"removed": list(ranking.removed), **ranking.notes, **done}
        return Change(zero_masks(linears(model, partial=True)), notes)

    def _kept(self, depth: int) -> set[int]:
        """Blocks that stay whatever their score."""
        return set(self.keep) | {"greedy": {0}, "reverse": {depth - 1}}.get(self.metric, set())

    def check(self) -> None:
        """Refuse more blocks than the source has, and kept blocks that it has not."""
        from stages.model.artifact import load_config

        config = load_config(self.source)
        depth = config.get_text_config().num_hidden_layers
        if unknown := [str(number) for number in self.keep if number >= depth]:
            raise Refusal(f"keep: {self.source} has blocks 0 to {depth - 1}, no {', '.join(unknown)}.")
        # Of whole blocks one has to stay.
        most = depth - max(len(self._kept(depth)), 1 if self.target == "block" else 0)
        if self.blocks > most:
            raise Refusal(
                f"blocks: {self.blocks} given; {self.source} has {depth}, of which {most} may go; remove "
                "fewer, or keep fewer."
            )

    def _choices(self, model: PreTrainedModel) -> list[int]:
        """Blocks that may go, in ascending order."""
        from stages.model.blocks import blocks
        from stages.pruning.depth.remove import output_projections

        depth = len(blocks(model))
        kept = self._kept(depth)
        if self.target == "attention":  # what an earlier step removed is not removed again
            found = enumerate(output_projections(model))
            kept |= {number for number, one in found if not one.weight.count_nonzero()}
        choices = [number for number in range(depth) if number not in kept]
        if len(choices) < self.blocks:
            raise Refusal(
                f"blocks: {self.blocks} given; of {depth} attentions only {len(choices)} are neither kept "
                "nor zero already; remove fewer."
            )
        return choices

    def rank(self, model: PreTrainedModel, data: Tensor | Asked | None, seed: int) -> Ranking:
        """Which blocks of `model` go, and why.

        Args:
            data: calibration windows, graded items, or None where nothing is read.
            seed: for shapley without one of its own.
        """
        from stages.pruning.depth import rank
        from stages.pruning.depth.ablate import Ablation, Rows

        choices = self._choices(model)
        if self.metric == "reverse":
            return rank.reverse(choices, self.blocks)
        assert data is not None and not isinstance(self.calibration, NoData)
        size = self.calibration.batch_size
        if isinstance(data, Asked):
            ablation = Ablation(model, data.rows, size, self.target, "greedy")
            return rank.greedy(ablation, choices, self.blocks, data)
        if self.metric == "angular":
            starts = rank.runs(choices, self.blocks)
            return rank.run_of(rank.angular(model, data, size, self.blocks), starts, self.blocks)
        if self.metric == "block-influence":
            scores = rank.block_influence(model, data, size, self.target)
            return rank.of({number: scores[number] for number in choices}, self.blocks)
        ablation = Ablation(model, Rows.of(data), size, self.target, self.metric)
        if self.metric == "greedy":
            return rank.greedy(ablation, choices, self.blocks, None)
        if self.metric == "perplexity":
            return rank.of(rank.perplexity(ablation, choices), self.blocks)
        assert self.samples is not None
        drawn = seed if self.seed is None else self.seed
        return rank.of(rank.shapley(ablation, choices, self.samples, drawn), self.blocks)

    def _remove(
        self, model: PreTrainedModel, removed: tuple[int, ...], means: dict[int, Tensor]
    ) -> dict[str, Any]:
        """Do it, in place; returns facts for the notes."""
        from stages.pruning.depth import mean
        from stages.pruning.depth.remove import drop, output_projections, zero

        if self.target == "attention":
            projections = output_projections(model)
            for number in removed:
                zero(projections[number], means.get(number))
            return {
                "zeroed": [projections[number].name for number in removed],
                "attention": "no plain checkpoint leaves it out: it is computed, and its output zeroed",
            }
        if means:
            mean.leave(model, removed, means)
        drop(model, removed)
        return {}

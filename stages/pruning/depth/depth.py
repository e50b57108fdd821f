"""Depth pruning: remove whole blocks, those that matter least, or only their attention.

What is left is a smaller plain checkpoint with its blocks renumbered (`stages.pruning.depth.remove`). The
metric chooses the blocks (`stages.pruning.depth.rank` has the formulas and papers). A checkpoint cannot omit
an attention, so target `attention` zeroes its output projection: the artifact says so, and its sparsity
counts those zeros. A removed block can leave its mean update on the calibration text behind, x -> x + E f(x)
(2407.16286), in the bias of the block before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from stages.compress.method import Change, Context, WholeModel
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import NoData, Seed
from stages.corpus.windows import Tokens, check_token_ids, tokens_or_none
from stages.model.artifact import load_config
from stages.model.blocks import blocks, embedding_rows, linears
from stages.pruning.depth import rank
from stages.pruning.depth.ablate import Ablation, ScoredRows
from stages.pruning.depth.mean import add_to_biases, make_biases, mean_updates
from stages.pruning.depth.rank import Ranking
from stages.pruning.depth.remove import output_projections, remove_blocks, without, zero_linear
from stages.pruning.depth.tasks import Choices, Items

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Batches(Tokens):
    """Windows on which blocks are judged."""

    batch_size: Annotated[int, Field(ge=1)] = 4
    """Windows per forward."""


def _kind(value: Any) -> str:
    settings = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "items" if "shots" in settings else tokens_or_none(value)


Judged = Annotated[
    Annotated[Batches, Tag("tokens")] | Annotated[Items, Tag("items")] | Annotated[NoData, Tag("no-data")],
    Discriminator(_kind),
]
"""Tokens; for greedy also graded items (with `shots`); no data for a recipe that reads none."""


class Depth(WholeModel):
    """Remove `blocks` blocks, or the attention of as many."""

    method: Literal["depth"]
    metric: Literal["block-influence", "angular", "reverse", "perplexity", "shapley", "greedy"]
    """How blocks are chosen; `angular` removes consecutive blocks."""
    blocks: Annotated[int, Field(ge=1)]
    target: Literal["block", "attention"] = "block"
    keep: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Numbers of blocks that are never removed. greedy also keeps block 0."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Random orders for shapley; each costs as many forwards as there are blocks."""
    seed: Seed | None = None
    """Seed of the random orders; null uses `run.seed`."""
    replace_by_mean: bool = False
    """Leave the mean update of a removed block behind, in families with a bias, or a setting for one, to hold
    it."""
    calibration: Judged

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.ignore:
            raise ValueError("depth removes whole blocks and ignores no matrix; name blocks in keep instead")
        if len(set(self.keep)) < len(self.keep):
            raise ValueError(f"keep names a block twice: {list(self.keep)}; name it once")
        if self.metric == "shapley" and self.samples is None:
            raise ValueError("metric shapley needs samples, the number of random orders, such as 32")
        if self.metric != "shapley" and not (self.samples is None and self.seed is None):
            raise ValueError(f"metric {self.metric} draws nothing; leave samples and seed out")
        if self.metric == "angular" and self.target == "attention":
            raise ValueError("metric angular compares runs of blocks; use another for target attention")
        if self.replace_by_mean and self.target == "block" and 0 not in self.keep:
            raise ValueError("replace_by_mean needs a block before each removed one; add 0 to keep")
        reads = self.metric != "reverse" or self.replace_by_mean
        if reads and isinstance(self.calibration, NoData):
            reader = "replace_by_mean" if self.metric == "reverse" else f"metric {self.metric}"
            raise ValueError(f"{reader} is measured on text; name a data set in calibration")
        if not reads and not isinstance(self.calibration, NoData):
            raise ValueError("calibration must be {dataset: none}, as no part of this recipe reads text")
        if isinstance(self.calibration, Items) and (self.metric != "greedy" or self.replace_by_mean):
            raise ValueError(
                "only metric greedy without replace_by_mean reads graded items; calibrate on a text instead"
            )
        return self

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Remove blocks, or zero their attention."""
        from stages.model.checkpoint import zero_masks

        data: Tensor | Choices | None = None
        if isinstance(self.calibration, Batches):
            data = context.windows()
        elif isinstance(self.calibration, Items):
            data = self.calibration.choices(context.tokenizer)
            source = f"data set {self.calibration.dataset}"
            check_token_ids(data.rows.tokens, embedding_rows(model), source, context.tokenizer)
        setting = make_biases(model, self.target) if self.replace_by_mean else {}
        ranking = self.rank(model, data, context.seed, context.tokenizer)
        means: dict[int, Tensor] = {}
        if self.replace_by_mean:
            assert isinstance(self.calibration, Batches) and isinstance(data, torch.Tensor)
            means = mean_updates(model, data, self.calibration.batch_size, self.target)
        remaining = set(range(len(blocks(model))))
        if self.target == "block":
            remaining -= set(ranking.removed)
        facts = self._remove(model, ranking.removed, means)
        notes = {"removed": list(ranking.removed), **ranking.notes, **setting, **facts}
        return Change(zero_masks(linears(model, partial=True)), notes, sorted(remaining))

    def check(self) -> None:
        """Refuse to remove more blocks than the source has, or to keep blocks that it does not have."""
        depth = load_config(self.source).get_text_config().num_hidden_layers
        if unknown := [str(number) for number in self.keep if number >= depth]:
            raise Refusal(
                f"keep names {', '.join(unknown)}, but {self.source} has only blocks 0 to {depth - 1}."
            )
        # At least one block must remain.
        most = depth - max(len(self._always_kept()), 1 if self.target == "block" else 0)
        if self.blocks > most:
            raise Refusal(
                f"blocks is {self.blocks}, but only {most} of the {depth} blocks of {self.source} can be "
                "removed; remove or keep fewer."
            )

    def _always_kept(self) -> set[int]:
        """Return the blocks that stay whatever their score."""
        return set(self.keep) | ({0} if self.metric == "greedy" else set())

    def _removable(self, model: PreTrainedModel) -> list[int]:
        """Return the blocks that may be removed, in ascending order."""
        depth = len(blocks(model))
        excluded = self._always_kept()
        if self.target == "attention":  # an attention that is already zero does not count again
            projections = enumerate(output_projections(model))
            excluded |= {number for number, linear in projections if not linear.weight.count_nonzero()}
        removable = [number for number in range(depth) if number not in excluded]
        if self.blocks > len(removable):
            raise Refusal(
                f"blocks is {self.blocks}, but of {depth} attentions only {len(removable)} are neither kept "
                "nor already zero; remove fewer."
            )
        return removable

    def rank(
        self,
        model: PreTrainedModel,
        data: Tensor | Choices | None,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Ranking:
        """Choose the blocks of `model` to remove.

        Args:
            data: calibration windows, graded items, or None for a metric that reads nothing.
            seed: for shapley, if the recipe has none.
        """
        removable = self._removable(model)
        if self.metric == "reverse":
            return rank.reverse(removable, self.blocks)
        assert data is not None and not isinstance(self.calibration, NoData)
        batch_size = self.calibration.batch_size
        if isinstance(data, Choices):
            ablation = Ablation(model, data.rows, batch_size, self.target, "greedy")
            items = self.calibration
            assert isinstance(items, Items)

            def write(omitted: frozenset[int]) -> dict[str, float]:
                with without(model, omitted, self.target) as rest:
                    return items.accuracies(rest, tokenizer)

            generated = items.readout == "generation"
            return rank.greedy(ablation, removable, self.blocks, data, write if generated else None)
        if self.metric == "angular":
            starts = rank.removable_runs(removable, self.blocks)
            return rank.closest_run(rank.angular(model, data, batch_size, self.blocks), starts, self.blocks)
        if self.metric == "block-influence":
            scores = rank.block_influence(model, data, batch_size, self.target)
            return rank.rank_by_score({number: scores[number] for number in removable}, self.blocks)
        ablation = Ablation(model, ScoredRows.of_text(data), batch_size, self.target, self.metric)
        if self.metric == "greedy":
            return rank.greedy(ablation, removable, self.blocks, None)
        if self.metric == "perplexity":
            return rank.rank_by_score(rank.perplexity(ablation, removable), self.blocks)
        assert self.samples is not None
        seed = seed if self.seed is None else self.seed
        return rank.rank_by_score(rank.shapley(ablation, removable, self.samples, seed), self.blocks)

    def _remove(
        self, model: PreTrainedModel, removed: tuple[int, ...], means: dict[int, Tensor]
    ) -> dict[str, Any]:
        """Remove the blocks or zero their attention, in place; return facts for the notes."""
        if self.target == "attention":
            projections = output_projections(model)
            for number in removed:
                zero_linear(projections[number], means.get(number))
            return {
                "zeroed": [projections[number].name for number in removed],
                "attention": "no plain checkpoint leaves it out: it is computed, and its output zeroed",
            }
        if means:
            add_to_biases(model, removed, means)
        remove_blocks(model, removed)
        return {}

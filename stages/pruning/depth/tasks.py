"""Graded items as something to prune by: multiple choice by likelihood, level by level.

Only the data set's training items are asked, so that a model is never judged on what chose its blocks.
The prompt is that of the graded suite's likelihood readout: examples in their fixed order, the question,
and each choice after a space.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.core.lazy import pd, torch
from stages.core.schema import Slug, Strict
from stages.pruning.depth.ablate import Rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Items(Strict):
    """Which graded items are asked: all training items of a graded data set."""

    dataset: Slug
    shots: Annotated[int, Field(ge=0)]
    """Few-shot examples before each question."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Answers run at a time."""

    def asked(self, tokenizer: PreTrainedTokenizerBase) -> Asked:
        """The items as rows of tokens.

        Raises:
            Refusal: the data set has no training items, or fewer examples than `shots`.
        """
        examples, items = (
            pd.read_parquet(DATASETS / self.dataset / f"{split}.parquet").to_dict("records")
            for split in ("fewshot", "train")
        )
        if len(examples) < self.shots or not len(items):
            raise Refusal(
                f"data set {self.dataset} has {len(items)} training items and {len(examples)} examples, "
                f"{self.shots} of these were asked for; raise its train, or lower shots."
            )
        head = "".join(f"{one['question']} {one['answer']}\n" for one in examples[: self.shots])
        pairs: list[tuple[list[int], int]] = []
        at = []
        for item in items:
            at.append(range(len(pairs), len(pairs) + len(item["choices"])))
            asked = f"{head}{item['question']}"
            context = tokenizer.encode(asked, add_special_tokens=False)
            for choice in item["choices"]:
                whole = tokenizer.encode(f"{asked} {choice}", add_special_tokens=False)
                pairs.append((whole, len(context)))
        tokens = torch.zeros(len(pairs), max(len(whole) for whole, _ in pairs), dtype=torch.long)
        predicted = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (whole, start) in enumerate(pairs):  # what follows a row's end changes nothing before it
            tokens[row, : len(whole)] = torch.tensor(whole)
            predicted[row, start : len(whole)] = True
        return Asked(
            Rows(tokens, predicted), at, [one["gold"] for one in items], [one["difficulty"] for one in items]
        )


@dataclass(frozen=True)
class Asked:
    """Items as rows, one a choice: `at[i]` are the rows of item i, the `gold[i]`-th of them right."""

    rows: Rows
    at: list[range]
    gold: list[int]
    levels: list[str]

    def accuracies(self, likelihoods: Tensor) -> dict[str, float]:
        """The share of a level's items whose right choice is the likeliest, from `[rows]` log-likelihoods."""
        right: dict[str, list[bool]] = {level: [] for level in self.levels}
        for rows, gold, level in zip(self.at, self.gold, self.levels, strict=True):
            right[level].append(int(likelihoods[rows.start : rows.stop].argmax()) == gold)
        return {level: sum(each) / len(each) for level, each in right.items()}

    def retained(self, likelihoods: Tensor, dense: dict[str, float]) -> float:
        """The mean over levels of accuracy / dense accuracy (2602.01997), levels without the latter left out.

        Raises:
            Refusal: that is all of them.
        """
        left = {level: accuracy for level, accuracy in dense.items() if accuracy}
        if not left:
            raise Refusal("the source answers none of the graded items right; choose others, or a text.")
        now = self.accuracies(likelihoods)
        return fsum(now[level] / accuracy for level, accuracy in left.items()) / len(left)

    def of_right_answers(self, likelihoods: Tensor) -> float:
        """The mean log-likelihood of the right choices."""
        rows = [rows[gold] for rows, gold in zip(self.at, self.gold, strict=True)]
        return float(likelihoods[rows].mean())

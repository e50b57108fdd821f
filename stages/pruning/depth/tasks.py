"""Graded items as the measure of depth pruning, level by level: multiple choice by likelihood, or generation.

Only the training items of the data set are used, so that a model is never evaluated on the items that chose
its blocks. The prompt is that of the graded suite's likelihood readout: examples in their fixed order, the
question, and each choice after a space. A generated answer is greedy, ends with its line, and is read as the
suite reads it. The model that writes it is the very model that would be left.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from math import fsum
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.files import DATASET, DATASETS, read_json
from stages.core.lazy import pd, torch
from stages.core.schema import Slug, Strict
from stages.corpus.bos import Bos, begin, bos_tokens
from stages.corpus.examples import few_shot_text
from stages.corpus.readings import is_right
from stages.pruning.depth.ablate import ScoredRows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Items(Strict):
    """All training items of a graded data set."""

    dataset: Slug
    shots: Annotated[int, Field(ge=0)]
    """Few-shot examples before each question."""
    bos: Bos = "auto"
    """Whether BOS is put before the examples."""
    readout: Literal["likelihood", "generation"] = "likelihood"
    """Whether an item counts as right if its right choice is the likeliest, or if the model writes it."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Choices per forward, and questions answered at a time."""

    def choices(self, tokenizer: PreTrainedTokenizerBase) -> Choices:
        """Tokenize the choices of all items.

        Raises:
            Refusal: the data set has no training items, or fewer examples than `shots`.
        """
        items, bos = self._items(), bos_tokens(tokenizer, self.bos)
        examples = few_shot_text(self.dataset, self.shots)
        sequences: list[Tensor] = []
        prompt_lengths: list[int] = []
        ranges: list[range] = []
        for item in items:
            ranges.append(range(len(sequences), len(sequences) + len(item["choices"])))
            prompt = f"{examples}{item['question']}"
            length = len(begin(tokenizer.encode(prompt, add_special_tokens=False), bos))
            for choice in item["choices"]:
                ids = begin(tokenizer.encode(f"{prompt} {choice}", add_special_tokens=False), bos)
                sequences.append(torch.tensor(ids, dtype=torch.long))
                prompt_lengths.append(length)
        # Padding at the end of a row changes nothing before it; `Ablation` leaves out what would.
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        predicted = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (sequence, start) in enumerate(zip(sequences, prompt_lengths, strict=True)):
            predicted[row, start : len(sequence)] = True
        gold, levels = [item["gold"] for item in items], [item["difficulty"] for item in items]
        return Choices(ScoredRows(tokens, predicted), ranges, gold, levels)

    def accuracies(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Let the model answer all items; return the share of right answers by level.

        Raises:
            Refusal: its logits are not finite.
        """
        from stages.corpus.decoding import end_ids, generate_answers  # imports classes of transformers

        items, examples = self._items(), few_shot_text(self.dataset, self.shots)
        answer = read_json(DATASETS / self.dataset / DATASET)["answer"]
        ends, bos = end_ids(model, tokenizer), bos_tokens(tokenizer, self.bos)
        texts = [f"{examples}{item['question']}" for item in items]
        prompts = [begin(tokenizer.encode(text, add_special_tokens=False), bos) for text in texts]
        right: dict[str, list[bool]] = {item["difficulty"]: [] for item in items}
        for at in range(0, len(items), self.batch_size):
            part = slice(at, at + self.batch_size)
            unused = torch.zeros(len(prompts[part]), answer["tokens"], dtype=torch.float64)
            written = generate_answers(model, prompts[part], unused, 0.0, ends, "\n", tokenizer)
            for item, tokens in zip(items[part], written, strict=True):
                text = tokenizer.decode(list(takewhile(lambda token: token not in ends, tokens)))
                line = text.split("\n")[0].strip()
                right[item["difficulty"]].append(is_right(answer["reading"], line, item))
        return {level: sum(each) / len(each) for level, each in right.items()}

    def _items(self) -> list[dict[str, Any]]:
        """Return the training items.

        Raises:
            Refusal: there are none.
        """
        rows = pd.read_parquet(DATASETS / self.dataset / "train.parquet").to_dict("records")
        items = [{str(column): value for column, value in row.items()} for row in rows]
        if not items:
            raise Refusal(
                f"data set {self.dataset} has no training items; set datasets.{self.dataset}.train above 0."
            )
        return items


@dataclass(frozen=True)
class Choices:
    """The choices of items, one per row: item i has rows `ranges[i]`, of which the `gold[i]`-th is right."""

    rows: ScoredRows
    ranges: list[range]
    gold: list[int]
    levels: list[str]

    def accuracies(self, likelihoods: Tensor) -> dict[str, float]:
        """Return, by level, the share of items whose right choice is the likeliest.

        Args:
            likelihoods: `[rows]` log-likelihoods.
        """
        right: dict[str, list[bool]] = {level: [] for level in self.levels}
        for rows, gold, level in zip(self.ranges, self.gold, self.levels, strict=True):
            right[level].append(int(likelihoods[rows.start : rows.stop].argmax()) == gold)
        return {level: sum(each) / len(each) for level, each in right.items()}

    def right_likelihood(self, likelihoods: Tensor) -> float:
        """Return the mean log-likelihood of the right choices."""
        rows = [rows[gold] for rows, gold in zip(self.ranges, self.gold, strict=True)]
        return float(likelihoods[rows].mean())


def retained(accuracies: dict[str, float], dense: dict[str, float]) -> float:
    """Return the mean of accuracy / dense accuracy over levels where the latter is not 0 (2602.01997).

    Raises:
        Refusal: it is 0 on every level.
    """
    answered = {level: accuracy for level, accuracy in dense.items() if accuracy}
    if not answered:
        raise Refusal(
            "the source answers none of the graded items right; calibrate on other items, with another "
            "readout, or on a text."
        )
    return fsum(accuracies[level] / accuracy for level, accuracy in answered.items()) / len(answered)

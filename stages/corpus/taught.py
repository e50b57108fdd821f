"""Data sets made by a model: rows of its tokenizer's tokens, optionally with its logits on them.

`train.parquet` and `held_out.parquet` have a row per example: `difficulty`, `input_ids`, `start` (the first
predicted token) and `text`, for people. `teacher.safetensors` has the teacher's distributions at the
predicted tokens of `train`, example after example: `tokens` `[n, k]` int32 and `log_probabilities` `[n, k +
1]` fp32 (see `rows.TopLogits`). Token ids mean nothing to another vocabulary, so its hash is stored in
`dataset.json` and compared. `bos` there says whether all examples begin with BOS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.files import DATASET, DATASETS, read_json, source_of, text_sha256, write_json
from stages.core.lazy import np, pd, torch
from stages.corpus.bos import begun
from stages.corpus.rows import Example, TopLogits, example, join_teachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAUGHT = "taught"
"""The kind of these data sets, as `dataset.json` has it."""
_TEACHER = "teacher.safetensors"


def downloaded(taught: Mapping[str, Any], dataset: str) -> str:
    """Return the downloaded data set that `dataset` is, or that a teacher made it from.

    Args:
        taught: the settings of each taught data set, by name.
    """
    seen = [dataset]
    while (teaching := taught.get(seen[-1])) and teaching.dataset not in seen:
        seen.append(teaching.dataset)
    return seen[-1]


@dataclass(frozen=True)
class GradedExample:
    """An example and the difficulty of its question; `all` where there are no levels."""

    example: Example
    difficulty: str = "all"


@dataclass(frozen=True)
class Lesson:
    """A data set made by a model; either all or none of the examples of `train` have a teacher."""

    train: list[GradedExample]
    held_out: list[GradedExample]
    facts: dict[str, Any] = field(default_factory=dict)
    """Further entries of `dataset.json`."""


def write_lesson(
    folder: Path, name: str, recipe: dict[str, Any], tokenizer: PreTrainedTokenizerBase, lesson: Lesson
) -> None:
    """Write `lesson`, made by `recipe`, into `folder` as data set `name`."""
    for split, graded in (("train", lesson.train), ("held_out", lesson.held_out)):
        rows = [
            {
                "difficulty": item.difficulty,
                "input_ids": item.example.input_ids.to(torch.int32).numpy(),
                "start": _start(item.example),
                "text": tokenizer.decode(item.example.input_ids),
            }
            for item in graded
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    teachers = [item.example.teacher for item in lesson.train if item.example.teacher is not None]
    if teachers:
        from safetensors.torch import save_file

        teacher = join_teachers(teachers)
        stored = {"tokens": teacher.tokens.to(torch.int32), "log_probabilities": teacher.log_probabilities}
        save_file(stored, folder / _TEACHER)
    parent = read_json(DATASETS / recipe["dataset"] / DATASET)
    made_of = parent.get("made_of", f"{recipe['dataset']} ({source_of(recipe['dataset'])})")
    facts = {
        "dataset": name,
        "kind": TAUGHT,
        "source": f"{recipe['method']} of {recipe['source']} on {made_of}",
        "made_of": made_of,
        "recipe": recipe,
        "vocabulary": vocabulary_hash(tokenizer),
        "bos": begun((item.example.input_ids.tolist() for item in lesson.train + lesson.held_out), tokenizer),
        "items": {"train": len(lesson.train), "held_out": len(lesson.held_out)},
    }
    write_json(folder / DATASET, facts | lesson.facts)


def read_lesson(
    name: str, tokenizer: PreTrainedTokenizerBase, root: Path = DATASETS
) -> tuple[list[GradedExample], list[GradedExample]]:
    """Return the training and the held-out examples, in the order written.

    Raises:
        Refusal: the data set's tokens are of another vocabulary than the tokenizer's.
    """
    facts = read_json(root / name / DATASET)
    if facts["vocabulary"] != vocabulary_hash(tokenizer):
        raise Refusal(
            f"data set {name} has tokens of {facts['recipe']['source']}, whose vocabulary is not that of the "
            f"model to train; set teach.{name}.source to a model with the same vocabulary."
        )
    from safetensors.torch import load_file

    stored = load_file(root / name / _TEACHER) if (root / name / _TEACHER).exists() else None
    splits: list[list[GradedExample]] = []
    for split in ("train", "held_out"):
        at, graded = 0, list[GradedExample]()
        rows = pd.read_parquet(root / name / f"{split}.parquet")
        for ids, start, difficulty in zip(rows["input_ids"], rows["start"], rows["difficulty"], strict=True):
            teacher = None
            if stored and split == "train":
                part = slice(at, at := at + len(ids) - int(start))
                teacher = TopLogits(stored["tokens"][part].long(), stored["log_probabilities"][part])
            tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))
            graded.append(GradedExample(example(tokens, int(start), teacher), difficulty))
        splits.append(graded)
    return splits[0], splits[1]


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of the tokens and their ids."""
    return text_sha256(json.dumps(sorted(tokenizer.get_vocab().items())))


def _start(item: Example) -> int:
    """Return the place of the first predicted token; all tokens after it are predicted too."""
    return int((item.labels == item.input_ids).nonzero()[0])

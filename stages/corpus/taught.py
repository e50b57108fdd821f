"""Data sets that a model has made: rows of its tokenizer's tokens, and perhaps its logits on them.

`train.parquet` and `held_out.parquet` have a row an example: `difficulty`, `input_ids`, `start` (the first
predicted token) and `text`, for reading. `teacher.safetensors` has the teacher's word on the predicted tokens
of `train`, all examples' after each other: `tokens` `[n, k]` int32 and `log_probabilities` `[n, k + 1]` fp32
(see `rows.TopLogits`). Tokens mean nothing to another vocabulary, so its hash is kept and compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.files import DATASETS, write_json
from stages.core.lazy import np, pd, torch
from stages.corpus.rows import Example, TopLogits, example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "taught"
TEACHER = "teacher.safetensors"


@dataclass(frozen=True)
class Graded:
    """An example and the difficulty of what it answers; `all` where there are no levels."""

    example: Example
    difficulty: str = "all"


@dataclass(frozen=True)
class Lesson:
    """A data set as a model has made it; the examples of `train` may have a teacher, all or none."""

    train: list[Graded]
    held_out: list[Graded]
    facts: dict[str, Any] = field(default_factory=dict)
    """For `dataset.json`."""


def write(
    folder: Path, name: str, recipe: dict[str, Any], tokenizer: PreTrainedTokenizerBase, lesson: Lesson
) -> None:
    """Write `lesson`, made by `recipe`, into `folder` as data set `name`."""
    for split, graded in (("train", lesson.train), ("held_out", lesson.held_out)):
        found = [_start(one.example) for one in graded]
        rows = [
            {
                "difficulty": one.difficulty,
                "input_ids": one.example.input_ids.to(torch.int32).numpy(),
                "start": start,
                "text": tokenizer.decode(one.example.input_ids),
            }
            for one, start in zip(graded, found, strict=True)
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    teachers = [one.example.teacher for one in lesson.train if one.example.teacher is not None]
    if teachers:
        from safetensors.torch import save_file

        stored = {
            "tokens": torch.cat([one.tokens for one in teachers]).to(torch.int32),
            "log_probabilities": torch.cat([one.log_probabilities for one in teachers]),
        }
        save_file(stored, folder / TEACHER)
    before = json.loads((DATASETS / recipe["dataset"] / "dataset.json").read_text())
    made_of = before.get("made_of", f"{recipe['dataset']} ({before.get('source', 'reasoning-gym')})")
    told = {
        "dataset": name,
        "kind": KIND,
        "source": f"{recipe['method']} of {recipe['source']} on {made_of}",
        "made_of": made_of,
        "recipe": recipe,
        "vocabulary": vocabulary(tokenizer),
    }
    items = {"train": len(lesson.train), "held_out": len(lesson.held_out)}
    write_json(folder / "dataset.json", told | {"items": items, **lesson.facts})


def read(
    name: str, tokenizer: PreTrainedTokenizerBase, root: Path = DATASETS
) -> tuple[list[Graded], list[Graded]]:
    """What is trained on and what is held out, in the order written.

    Raises:
        Refusal: the tokens are of another vocabulary than the tokenizer's.
    """
    told = json.loads((root / name / "dataset.json").read_text())
    if told["vocabulary"] != vocabulary(tokenizer):
        raise Refusal(
            f"data set {name} holds tokens of {told['recipe']['source']}, whose vocabulary is not that of "
            "the model to be trained; teach it by a model that has the same."
        )
    from safetensors.torch import load_file

    stored = load_file(root / name / TEACHER) if (root / name / TEACHER).exists() else None
    splits: list[list[Graded]] = []
    for split in ("train", "held_out"):
        at, found = 0, list[Graded]()
        rows = pd.read_parquet(root / name / f"{split}.parquet")
        for ids, start, difficulty in zip(rows["input_ids"], rows["start"], rows["difficulty"], strict=True):
            teacher = None
            if stored and split == "train":
                part = slice(at, at := at + len(ids) - int(start))
                teacher = TopLogits(stored["tokens"][part].long(), stored["log_probabilities"][part])
            tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))
            found.append(Graded(example(tokens, int(start), teacher), difficulty))
        splits.append(found)
    return splits[0], splits[1]


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 of the tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _start(one: Example) -> int:
    """The first predicted token; all after it are predicted too."""
    return int((one.labels == one.input_ids).nonzero()[0])

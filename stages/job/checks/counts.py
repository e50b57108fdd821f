"""Windows of tokens: whether each text has as many as recipes and suites ask for, before anything runs.

Texts and tokenizers that are on this machine, in a `path:` source or downloaded already, are counted with the
functions that the stages use, so the numbers are theirs. Others are left to the stages. A text of more than
`LARGEST_TEXT` bytes is left too, as counting would take minutes. Counts are kept in `data/runs/windows.json`
by the hash of everything they depend on, so an unchanged text is counted once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from stages.core import identity
from stages.core.errors import Refusal
from stages.core.files import (
    DATASET,
    DATASETS,
    MODELS,
    RECORD,
    RUNS,
    read_json,
    sha256,
    text_sha256,
    write_json,
)
from stages.core.numbers import apportion
from stages.core.schema import Strict
from stages.corpus.bos import Bos, bos_tokens
from stages.corpus.examples import Selection
from stages.corpus.windows import TextPart, Tokens, cut_windows, distinct_windows, read_parts
from stages.job.params import Params
from stages.model.positions import most_tokens_of
from stages.sources.conversations import Conversations
from stages.sources.mix import Mix
from stages.sources.origin import portable
from stages.sources.safetensors import Safetensors
from stages.sources.text import Text
from stages.sources.tokenizer import original_tokenizer

COUNTS = RUNS / "windows.json"
"""The kept counts."""
LARGEST_TEXT = 2**23
"""Bytes of a text that is counted; its overlaps are looked for in memory."""
Split = Literal["calibration", "evaluation"]
Splits = dict[str, dict[Split, list[TextPart]]]
_DONE = {"calibration": "to learn from", "evaluation": "to score or hold out"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Wanted:
    """Windows that a recipe or a suite asks for."""

    at: str
    """The setting of their number, as params.yaml names it."""
    model: str
    """The base model whose tokens they are."""
    dataset: str
    split: Split
    length: int
    number: int
    bos: Bos
    distinct: bool
    """Whether repeated windows count once, as they do where windows are learned from."""


@dataclass(frozen=True)
class Counted:
    """The windows of each part of a data set; the only part of one that is no mix has no name."""

    wanted: Wanted
    parts: tuple[tuple[str, float, int], ...]
    """Name, share and number of windows."""

    def __str__(self) -> str:
        numbers = ", ".join(f"{count} of {name}" if name else str(count) for name, _, count in self.parts)
        return (
            f"{self.wanted.dataset}: {numbers} window(s) of {self.wanted.length} tokens of "
            f"base/{self.wanted.model} {_DONE[self.wanted.split]}"
        )

    def mistakes(self) -> Iterator[str]:
        """Yield each part that has fewer windows than its share of the wanted ones."""
        wanted = self.wanted
        shares = {name: share * wanted.number for name, share, _ in self.parts}
        needed = apportion(shares, wanted.number)
        for name, _, count in self.parts:
            if count < needed[name]:
                part = f", part {name}," if name else ""
                yield (
                    f"{wanted.at}: {needed[name]} window(s) asked for, but data set {wanted.dataset}{part} "
                    f"has {count} of {wanted.length} tokens {_DONE[wanted.split]}; ask for fewer, lower "
                    "sequence_length, or use a longer text."
                )


def of_windows(params: Params) -> tuple[list[str], list[str]]:
    """Return mistakes, and a line for each text and length with its number of windows."""
    mistakes, lines, read = [], [], Splits()
    for wanted in _wanted(params):
        limit = reading_limit(params, wanted.model)
        if limit is not None and wanted.length > limit:
            mistakes.append(
                f"{wanted.at.rpartition('.')[0]}.sequence_length: {wanted.length} given, but "
                f"base/{wanted.model} reads {limit} tokens at most; lower it."
            )
            continue
        try:
            count = _counted(params, wanted, read)
        except Refusal as refusal:
            mistakes.append(f"{wanted.at.rpartition('.')[0]}: {refusal}")
            continue
        if count:
            mistakes += count.mistakes()
            lines.append(f"{count}.")
    return mistakes, list(dict.fromkeys(lines))


def _wanted(params: Params) -> Iterator[Wanted]:
    """Yield the windows that recipes and suites ask for, of every text that is a data set."""
    for artifact, recipe in params.recipes().items():
        base = params.base_of(artifact)
        for field, text in recipe.reads().items():
            dataset = params.datasets.get(text.dataset)
            length: int | None = getattr(text, "sequence_length", None)
            if base is None or not isinstance(dataset, Text | Mix) or length is None:
                continue
            if isinstance(text, Tokens) and text.tokens == "random":
                continue
            at = f"{artifact.replace('/', '.', 1)}.{field}".rstrip(".")
            known, bos = (base, text.dataset), text.bos
            yield Wanted(
                f"{at}.num_samples", *known, "calibration", length, text.num_samples, bos, distinct=True
            )
            if isinstance(text, Selection):
                yield Wanted(
                    f"{at}.held_out", *known, "evaluation", length, text.held_out, bos, distinct=True
                )
    bases = dict.fromkeys(filter(None, map(params.base_of, params.evaluate.candidates)))
    for name, suite in params.suites.perplexity.items():
        for base in bases:
            at = f"suites.perplexity.{name}.windows"
            length = suite.sequence_length
            yield Wanted(
                at,
                base,
                params.suites.dataset_of(name),
                "evaluation",
                length,
                suite.windows,
                suite.bos,
                distinct=False,
            )


def _counted(params: Params, wanted: Wanted, read: Splits) -> Counted | None:
    """Count the windows, or recall their number; None if the text or the tokenizer is not here.

    Args:
        read: see `_parts`.
    """
    folder, dataset = checkpoint_of(params, wanted.model), params.datasets.get(wanted.dataset)
    if folder is None or not isinstance(dataset, Text | Mix):
        return None
    if (origin := origin_of(wanted.dataset, dataset)) is None:
        return None

    def count() -> list[tuple[str, float, int]]:
        tokenizer = tokenizer_of(folder, f"base/{wanted.model}")
        return _count(wanted, tokenizer, _parts(origin, wanted.dataset, dataset, wanted.split, read))

    code = identity.digest("download", type(dataset).__module__)
    settings = [wanted.split, wanted.length, wanted.bos, wanted.distinct]
    parts = kept(COUNTS, code, folder, dataset, settings, count)
    return Counted(wanted, tuple((name, share, number) for name, share, number in parts))


def kept(
    file: Path, code: str, folder: Path, dataset: Strict, settings: Any, count: Callable[[], Any]
) -> Any:
    """Return what `count` finds in a data set; it is kept in `file` and found once.

    Args:
        code: the digest of the code that counts.
        folder: the checkpoint whose tokenizer it uses.
        settings: whatever else the count depends on.
    """
    facts = [
        code,
        identity.versions()["transformers"],
        {name: sha256(folder / name) for name in _TOKENIZER_FILES if (folder / name).exists()},
        portable(dataset.model_dump(mode="json")),
        settings,
    ]
    key = text_sha256(json.dumps(facts))
    found: dict[str, Any] = read_json(file) if file.exists() else {}
    if key not in found:
        found[key] = count()
        write_json(file, found)
    return found[key]


def _count(wanted: Wanted, tokenizer: Any, parts: list[TextPart]) -> list[tuple[str, float, int]]:
    """Return the name, share and number of windows of each part."""
    bos = bos_tokens(tokenizer, wanted.bos)
    if wanted.distinct:
        windows = distinct_windows(tokenizer, parts, wanted.length, bos)
    else:
        windows = [(part, cut_windows(tokenizer, part.documents, wanted.length)) for part in parts]
    return [(part.name, part.share, len(rows)) for part, rows in windows]


@cache
def tokenizer_of(folder: Path, source: str) -> Any:
    """Load the tokenizer of a checkpoint, once; `source` names it in messages."""
    return original_tokenizer(folder, source)


def checkpoint_of(params: Params, base: str) -> Path | None:
    """Return the folder with a model's config and tokenizer: its source or its copy, if here."""
    model = params.models[base]
    if isinstance(model, Safetensors) and model.source.startswith("path:"):
        return Path(model.source.removeprefix("path:")) / model.folder
    folder = MODELS / "base" / base
    if not (folder / RECORD).exists():
        return None
    settings = portable(model.model_dump(mode="json", exclude={"in_features"}))
    record = read_json(folder / RECORD)["base"]
    return folder if settings.items() <= record.items() else None


def reading_limit(params: Params, base: str) -> int | None:
    """Return the tokens that a model reads at most; None if its config is not here or does not say."""
    folder = checkpoint_of(params, base)
    if folder is None or not (folder / "config.json").exists():
        return None
    return most_tokens_of(read_json(folder / "config.json"))


def origin_of(name: str, dataset: Text | Mix | Conversations) -> Literal["path", "downloaded"] | None:
    """Say where a text can be read; None where it cannot, or is too large to count."""
    texts = list(dataset.parts.values()) if isinstance(dataset, Mix) else [dataset]
    files = [
        Path(text.source.removeprefix("path:")) / text.file
        for text in texts
        if text.source.startswith("path:")
    ]
    if len(files) == len(texts):
        return "path" if sum(map(_size, files)) <= LARGEST_TEXT else None
    folder = DATASETS / name
    if not (folder / DATASET).exists() or _size(folder) > LARGEST_TEXT:
        return None
    settings = portable(dataset.model_dump(mode="json"))
    return "downloaded" if settings.items() <= read_json(folder / DATASET).items() else None


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _parts(origin: str, name: str, dataset: Text | Mix, split: Split, read: Splits) -> list[TextPart]:
    """Return the parts of a data set's split.

    Args:
        read: texts that were read from their sources, by the name of their data set; it grows.
    """
    if origin == "downloaded":
        return read_parts(name, split)
    if name not in read:
        if isinstance(dataset, Mix):
            splits = [(part, dataset.parts[part].share, texts) for part, texts in dataset.splits().items()]
        else:
            splits = [("", 1.0, dataset.split())]
        read[name] = {
            "calibration": [TextPart(part, share, texts[0]) for part, share, texts in splits],
            "evaluation": [TextPart(part, share, texts[1]) for part, share, texts in splits],
        }
    return read[name][split]

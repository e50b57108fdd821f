"""Base models stored as GGUF, dequantized to plain safetensors.

GGUF weights usually lie on a quantized grid, and dequantizing leaves them on it. Quantizing them again to 4
bits with the same groups then costs almost nothing, which would flatter that method next to one applied to a
full-precision model. The grids of all tensors are therefore counted and kept in the record.

A package index limits the size of a package, so a file may be cut into `parts`, one a package.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.reading import reading
from stages.core.schema import Sha256, Strict
from stages.model.artifact import pretrained
from stages.sources.base import Model, write_checkpoint
from stages.sources.origin import InnerPath, Origin, assembled, fetched

_GROUP_SIZES = {
    "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "Q2_K": 16, "Q3_K": 16, "Q6_K": 16,
}  # fmt: skip
_FLOAT_TYPES = ("F16", "F32", "BF16")


class FilePart(Strict):
    """A further piece of a file that is too large for one package."""

    source: Origin
    file: InnerPath


class Gguf(Model):
    """One `.gguf` file inside a source, or in pieces inside several packages."""

    format: Literal["gguf"]
    file: InnerPath
    parts: tuple[FilePart, ...] = ()
    """The pieces that follow `file`, in order, each in a `pypi:` package of its own."""
    sha256: Sha256
    """Of the file, or of all pieces joined."""

    @model_validator(mode="after")
    def _from_packages(self) -> Self:
        sources = [self.source, *(part.source for part in self.parts)]
        if self.parts and (others := [source for source in sources if not source.startswith("pypi:")]):
            raise ValueError(
                f"parts are files of pypi: packages, but {others[0]} is none; give one file instead"
            )
        return self

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        """Yield the local path of the whole file.

        Raises:
            Refusal: it cannot be fetched, or has another hash than params say.
        """
        pieces = [(self.source, self.file), *((part.source, part.file) for part in self.parts)]
        with assembled(pieces, self.sha256) if self.parts else fetched(*pieces[0], self.sha256) as path:
            yield path

    def write(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Write config, tokenizer and `dtype` safetensors into `folder`; return facts for the record."""
        from transformers import AutoTokenizer, GgufConfig

        # The conversion logs its whole map of tensors; the progress bar is enough.
        logging.getLogger("gguf").setLevel(logging.WARNING)
        with self.fetched() as path:
            if path.is_dir():
                raise Refusal(f"{self.source} {self.file} is a folder; name the .gguf file in it.")
            with reading(f"the tokenizer of {self.source}"):
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer.save_pretrained(folder)
            model = pretrained(
                self.source,
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
            )
            return {"grid": count_grids(path), **write_checkpoint(model, self.source, folder)}


def count_grids(path: Path) -> dict[str, Any] | None:
    """Return the numbers of tensors and weights of each type in a GGUF file, and the type of most weights.

    None when every tensor is a float.
    """
    from gguf import GGUFReader

    tensors, weights = Counter[str](), Counter[str]()
    for tensor in GGUFReader(path).tensors:
        tensors[tensor.tensor_type.name] += 1
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    quantized = {name: count for name, count in weights.items() if name not in _FLOAT_TYPES}
    if not quantized:
        return None
    main = max(quantized, key=lambda name: quantized[name])
    return {
        "format": main,
        "group_size": _GROUP_SIZES.get(main),
        "tensors": dict(sorted(tensors.items())),
        "weights": dict(sorted(weights.items())),
    }

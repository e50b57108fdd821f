"""Base models stored as GGUF, dequantized to plain safetensors.

GGUF weights usually lie on a quantized grid, and dequantizing leaves them on it. Quantizing them again to 4
bits with the same groups then costs almost nothing, which would flatter that method next to one applied to a
full-precision model. The grids of all tensors are therefore counted and kept in the record.

A package index limits the size of a package, so a file may be cut into `parts`, one a package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from stages.core.lazy import torch
from stages.core.schema import Sha256, Strict
from stages.sources.base import Model
from stages.sources.ggml import dequantized_gguf
from stages.sources.origin import InnerPath, Origin, assembled, fetched


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
        with self.fetched() as path:
            return dequantized_gguf(path, f"{self.source} {self.file}", folder, dtype)

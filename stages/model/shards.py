"""Finished blocks on disk: a safetensors shard each, and a JSON file of facts sealed by a hash of both."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.errors import Unreadable
from stages.core.files import checksum, read_json, text_sha256, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockFacts:
    """Facts about a finished block, for the artifact's config and record."""

    sizes: Mapping[str, int]
    """The counts of `stages.model.checkpoint.Sizes`."""
    scheme: Mapping[str, Any] | None
    """How packed linears are stored, see `Quantized.scheme`; None if none is packed."""
    fake: bool
    """Whether linears are on a grid but stored as dense weights."""
    quantized: Sequence[str]
    """Full names of the linears on a grid."""
    noted: Mapping[str, Sequence[str]]
    """The method's notes on the block."""


class Shards:
    """The finished blocks of one run.

    Args:
        folder: a folder of their own; it may not exist yet.
        blocks: the full names of all blocks, in order.
    """

    def __init__(self, folder: Path, blocks: Iterable[str]) -> None:
        self._folder = folder
        self._files = {name: folder / f"{number:05d}.safetensors" for number, name in enumerate(blocks)}

    def file(self, block: str) -> Path:
        """Return the path of a block's shard."""
        return self._files[block]

    def done(self, block: str) -> bool:
        """Tell whether a block is finished."""
        return self._facts_file(block).exists()

    def finish(self, block: str, facts: BlockFacts, shard: str) -> None:
        """Mark a block as finished, whose shard is written and has the checksum `shard`."""
        values = vars(facts)
        write_json(self._facts_file(block), values | {"seal": _seal(shard, values)})

    def facts(self, block: str) -> BlockFacts:
        """Read the facts of a finished block."""
        values = read_json(self._facts_file(block))
        del values["seal"]
        return BlockFacts(**values)

    def forget_damaged(self) -> None:
        """Mark blocks with damaged files as unfinished, e.g. after a crash of the machine.

        Raises:
            Unreadable: the files cannot be read now, which may pass.
        """
        for block in filter(self.done, self._files):
            try:
                values = read_json(self._facts_file(block))
                intact = values.pop("seal") == _seal(checksum(self.file(block)), values)
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                intact = False
            except OSError as error:
                raise Unreadable(
                    f"the finished blocks in {self._folder} cannot be read ({error}); make them readable, or "
                    "delete the folder to start over."
                ) from error
            if not intact:
                log.warning("%s or its JSON is damaged; the block is compressed again", self.file(block))
                self._facts_file(block).unlink()

    def delete(self) -> None:
        """Delete the finished blocks of all runs of this artifact."""
        shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _facts_file(self, block: str) -> Path:
        return self.file(block).with_suffix(".json")


def _seal(shard: str, facts: Mapping[str, Any]) -> str:
    """Hash a finished block: its shard's checksum, and its facts as JSON."""
    return text_sha256(f"{json.dumps(facts, sort_keys=True)} {shard}")

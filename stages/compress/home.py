"""Where a block's weights come from and go to, so that one walk serves models in memory and larger ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from stages.core.numbers import check_finite

if TYPE_CHECKING:
    from torch import nn


class Home(Protocol):
    """Where blocks live while they are not worked on. It refuses weights that are NaN or infinite."""

    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> AbstractContextManager[bool]:
        """Hold the block's weights in memory for the body; yield whether an earlier run finished the block.

        A body that raises leaves nothing behind.

        Args:
            dense: hold the source's weights even of a finished block, so that later blocks see its outputs.
        """


class InMemory:
    """The home of a model that is loaded as a whole."""

    @contextmanager
    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        """Check the weights; there is nothing to load or to store."""
        check_finite("the model", block.named_parameters(name))
        yield False

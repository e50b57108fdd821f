"""Libraries that take long to import, imported when one of their attributes is first used.

The settings of every method are read whenever params.yaml is. A method's file holds its settings and its
arithmetic together, so it takes `torch` from here: reading params imports no torch, running the method does.

    from __future__ import annotations          # annotations may name torch.Tensor without importing it

    from stages.core.lazy import torch
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


@contextmanager
def importing() -> Iterator[None]:
    """Pause the garbage collector, which slows imports: they create many objects and hardly any garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def exempt_imported() -> None:
    """Exempt the objects that exist now from garbage collection, once a process; call it before models exist.

    Each full collection would look at the million objects of torch and transformers again.
    """
    gc.freeze()


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        module = sys.modules.get(self.__name__)
        if module is None:
            with importing():
                module = import_module(self.__name__)
        return getattr(module, name)


if TYPE_CHECKING:
    from unittest import mock

    import numpy as np
    import pandas as pd
    import torch
else:
    mock = _Lazy("unittest.mock")  # which imports asyncio
    np, pd, torch = _Lazy("numpy"), _Lazy("pandas"), _Lazy("torch")

__all__ = ["exempt_imported", "importing", "mock", "np", "pd", "torch"]

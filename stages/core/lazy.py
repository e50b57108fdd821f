"""Libraries that take long to import, imported when one of their attributes is first used.

The settings of every method are read whenever params.yaml is. A method's file holds its settings and its
arithmetic together, so it takes `torch` from here: reading params imports no torch, running the method does.

    from __future__ import annotations          # annotations may name torch.Tensor without importing it

    from stages.core.lazy import torch
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    from unittest import mock

    import numpy as np
    import pandas as pd
    import torch
else:
    mock = _Lazy("unittest.mock")  # which imports asyncio
    np, pd, torch = _Lazy("numpy"), _Lazy("pandas"), _Lazy("torch")

__all__ = ["mock", "np", "pd", "torch"]

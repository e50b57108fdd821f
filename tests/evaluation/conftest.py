"""Fixtures of the evaluation tests."""

from collections.abc import Iterator
from pathlib import Path

import lm_eval.tasks
import pytest

from stages.evaluation import stock
from tests.stock import FOLDERS


@pytest.fixture
def few_stock_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm-eval's own task files, but only those asked for here: indexing all of them takes ten seconds."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / name) for name in FOLDERS]
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_defaults=True, include_path=None: real(
            include_defaults=False, include_path=[*folders, include_path] if include_defaults else None
        ),
    )
    stock.all_tasks.cache_clear()
    yield
    stock.all_tasks.cache_clear()

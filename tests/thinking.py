"""Settings of thinking for models with random weights."""

from typing import Any

RULES: dict[str, Any] = {
    "begin": "\n", "end": "e", "wait": "W", "answer": "A:", "temperature": 1.0, "budgets": [0, 3, 40],
}  # fmt: skip
"""The end has one byte, so that models with random weights say it by chance, in some rows but not in all."""

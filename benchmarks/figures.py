"""Print the figures of benchmarks, a JSON object per line."""

import json


def tell(figure: str, value: float | bool) -> None:
    """Print a figure, a number rounded to six decimals."""
    rounded = value if isinstance(value, bool) else round(value, 6)
    show(json.dumps({"figure": figure, "value": rounded}))


def show(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201

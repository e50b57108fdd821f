"""What benchmarks print: one figure a line, as JSON."""

import json


def tell(figure: str, value: float | bool) -> None:
    """Print a figure at once, numbers to six decimals."""
    told = value if isinstance(value, bool) else round(value, 6)
    print(json.dumps({"figure": figure, "value": told}), flush=True)  # noqa: T201

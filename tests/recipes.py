"""Settings of the common methods for the tiny models, and chains of recipes."""

from typing import Any

from tests.pipeline import NONE, TEXT, do, params

MAGNITUDE = {"method": "magnitude", "sparsity": 0.5, "scope": "matrix", "calibration": NONE}
WANDA = {"method": "wanda", "sparsity": 0.5, "calibration": TEXT}
SPARSEGPT = {"method": "sparsegpt", "sparsity": 0.5, "calibration": TEXT}
RANDOM = {"method": "random", "sparsity": 0.5, "seed": 0, "calibration": NONE}
RTN = {"method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32, "calibration": TEXT}
LORA = {
    "method": "lora", "train": TEXT, "rank": 2, "alpha": 4, "learning_rate": 0.01, "steps": 2,
    "batch_size": 2,
}  # fmt: skip


def chain(*steps: tuple[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Recipes by artifact, from (section, settings); each has the one before it as its source."""
    recipes: dict[str, dict[str, Any]] = {}
    source = "base/tiny"
    for number, (section, settings) in enumerate(steps):
        artifact = f"{section}/step-{number}"
        recipes[artifact] = {"source": source, **settings}
        source = artifact
    return recipes


def run(family: str, *steps: tuple[str, dict[str, Any]]) -> list[str]:
    """Run a chain in order and return its artifacts."""
    recipes = chain(*steps)
    do(params(family, recipes), list(recipes))
    return list(recipes)

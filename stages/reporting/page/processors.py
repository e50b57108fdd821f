"""Which processor each model was made on: another one rounds otherwise, so its bytes may differ."""

from collections.abc import Mapping, Sequence
from typing import Any

_CPU = "cpu"


def processors(records: Mapping[str, Mapping[str, Any]], candidates: Sequence[str]) -> dict[str, list[str]]:
    """Return the processors that every candidate was made on, with those of its sources; none of a base.

    Args:
        records: the `artifact.json` of each candidate. A source that is no candidate is unknown.
    """
    made = {}
    for name in candidates:
        lineage = records.get(name, {}).get("lineage", [name])
        known = [records[step]["numerics"] for step in lineage if records.get(step, {}).get("numerics")]
        made[name] = list(dict.fromkeys(map(_named, known)))
    return made


def _named(numerics: Mapping[str, Any]) -> str:
    """Name a processor by what its results depend on, such as `AVX512 with amx_bf16`; a card by its name."""
    if numerics["device"] != _CPU:
        return str(numerics["device"])
    name = str(numerics.get("cpu_capability", _CPU))
    if units := numerics.get("cpu_matrix_units"):
        name += f" with {', '.join(units)}"
    return f"{name}, portable" if numerics.get("numerics") == "portable" else name

"""The JSON Schema of params.yaml, by which an editor completes names and marks mistakes as you type.

It knows each section by itself; what sections say of each other, such as a source that does not exist, only
`prunequant check` knows. docs/params.schema.json holds it; `prunequant schema` prints it.
"""

from typing import Any

from stages.job.params import Params


def json_schema() -> dict[str, Any]:
    """Return the schema, JSON Schema 2020-12."""
    described: dict[str, Any] = _plain(Params.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def _plain(value: Any, named: bool = False) -> Any:
    """Leave out what editors do not use, and let a value fit several forms: `{dataset: none}` fits two.

    Args:
        named: whether the keys are names of fields or of classes.
    """
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        "anyOf" if key == "oneOf" and not named else key: _plain(
            inner, key in ("properties", "$defs") and not named
        )
        for key, inner in value.items()
        if named or key not in ("title", "discriminator")
    }

"""The JSON Schema of params.yaml, by which an editor completes names and marks mistakes as you type.

It knows each section by itself; what sections say of each other, such as a source that does not exist, only
`prunequant check` knows. docs/params.schema.json holds it; `prunequant schema` prints it.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from stages.core.schema import Strict
from stages.job.params import Params


def json_schema() -> dict[str, Any]:
    """Return the schema, JSON Schema 2020-12."""
    described: dict[str, Any] = _plain(Params.model_json_schema(schema_generator=_Explained))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


class _Explained(GenerateJsonSchema):
    """Give every field the text that stands below it in its class."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Return the JSON Schema of one class of settings."""
        described = super().model_schema(schema)
        texts = {
            name: text
            for config in reversed(schema["cls"].__mro__)
            if issubclass(config, Strict)
            for name, text in _field_texts(config)
        }
        for name, field in described.get("properties", {}).items():
            if name in texts:
                field["description"] = texts[name]
        return described


def _field_texts(config: type[Strict]) -> Iterator[tuple[str, str]]:
    """Yield each field of a class that a text stands below, and the text in one line."""
    (defined,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(defined, ast.ClassDef)
    for field, below in zip(defined.body, defined.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.split())


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

"""docs/params.md: every setting of params.yaml, from its JSON Schema, for reading.

A section has a heading, then one for each of its methods, kinds or formats; classes of settings that several
share follow at the end. `prunequant schema --markdown` prints it.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_HEAD = """# Settings of params.yaml

Every section and setting, its type and its default, with a star where it must be given. This page is made
from the schema: `prunequant schema --markdown` prints that of your version, and `prunequant check` reports
every mistake in a file. Editors with a YAML language server show the same texts as you type, from
[params.schema.json](params.schema.json).
"""
_LIMITS = {
    "minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}",
    "exclusiveMaximum": "below {}", "minItems": "at least {} of them", "maxItems": "at most {} of them",
    "minProperties": "at least {} of them",
}  # fmt: skip
_TAGS = ("method", "kind", "format", "test")


def params_page(schema: dict[str, Any]) -> str:
    """Return the page of a JSON Schema of params.yaml, as Markdown."""
    return "\n".join([_HEAD, *_Page(schema).lines()])


class _Page:
    """The classes of a schema, and where each has its heading."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.sections: dict[str, Any] = schema["properties"]
        self.classes: dict[str, Any] = schema["$defs"]
        self.required: list[str] = schema["required"]
        self.headings: dict[str, str] = {}
        for name, section in self.sections.items():
            entry = section.get("additionalProperties", section)
            for member in _members(entry):
                tag = self._tag(member)
                self.headings.setdefault(member, f"{name}: {tag}" if tag else name)
        self.shared = sorted(self.classes.keys() - self.headings.keys())
        self.headings |= {name: f"Shared: {name}" for name in self.shared}

    def lines(self) -> Iterator[str]:
        """Yield the page's lines below its head."""
        for name, section in self.sections.items():
            entry = section.get("additionalProperties", section)
            members = _members(entry)
            yield from (f"## {name}", "", _prose(section["description"]), "")
            if "additionalProperties" in section:
                yield from (f"A mapping from names to entries: {self._type(entry)}.", "")
            if name not in self.required:
                yield from ("It may be left out.", "")
            for member in members:
                if self.headings[member] != name:
                    yield from (f"### {self.headings[member]}", "")
                yield from self._table(member)
        yield from ("## Shared settings", "", "Groups of settings that the tables above name.", "")
        for member in self.shared:
            yield from (f"### {self.headings[member]}", "")
            yield from self._table(member)

    def _tag(self, member: str) -> str | None:
        """Return the word that picks a class, such as `wanda`; None if it is the only one."""
        fields = self.classes[member]["properties"]
        return next((str(fields[tag]["const"]) for tag in _TAGS if "const" in fields.get(tag, {})), None)

    def _table(self, member: str) -> Iterator[str]:
        described = self.classes[member]
        if text := described.get("description"):
            yield from (_prose(text), "")
        yield from ("| setting | type | default | |", "|---|---|---|---|")
        for name, field in described["properties"].items():
            star = " *" if name in described.get("required", ()) else ""
            default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
            cells = (f"`{name}`{star}", self._type(field), default, _prose(field.get("description", "")))
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        yield ""

    def _type(self, field: dict[str, Any]) -> str:
        """Return the legal values of a field in words, classes as links."""
        if "$ref" in field:
            heading = self.headings[_name(field)]
            return f"[{heading.rpartition(': ')[2]}](#{_anchor(heading)})"
        if "anyOf" in field:
            return " or ".join(self._type(each) for each in field["anyOf"])
        if "const" in field or "enum" in field:
            values = field.get("enum", [field.get("const")])
            return " or ".join(f"`{v if isinstance(v, str) else json.dumps(v)}`" for v in values)
        limits = [
            text.format(f"{field[key]:,}".replace(",", "")) for key, text in _LIMITS.items() if key in field
        ]
        return ", ".join([self._bare(field), *limits])

    def _bare(self, field: dict[str, Any]) -> str:
        match field.get("type"):
            case "null":
                return "`null`"
            case "array":
                items = field.get("items")
                return f"list of {self._type(items)}" if items else "list"
            case "object":
                entry = field.get("additionalProperties")
                return f"names to {self._type(entry)}" if isinstance(entry, dict) else "mapping"
            case str(kind):
                return kind
        return "any value"


def _members(entry: dict[str, Any]) -> list[str]:
    """Return the classes that an entry may be."""
    return [_name(each) for each in entry.get("anyOf", [entry]) if "$ref" in each]


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _anchor(heading: str) -> str:
    """Return the anchor of a heading, alike on the site and on git hosts."""
    return re.sub(r"[^a-z0-9_-]", "", heading.lower().replace(" ", "-"))


def _prose(text: str) -> str:
    """Return a docstring as Markdown: what is no code means itself."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", part.replace("<", "&lt;"))
        for part in parts
    )

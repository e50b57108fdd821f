"""Put data, scripts and styles into the page, so that it is one file that fetches nothing.

Text of models gets into a script as JSON that cannot end it. What is large is packed: gzip in base64, which
the page unpacks itself.
"""

import base64
import gzip
import json
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def as_json(value: Any) -> str:
    """Return compact JSON that is safe inside a script element; numbers that JSON lacks become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(character): escape for character, escape in _UNSAFE.items()})


def embedded(value: Any) -> Markup:
    """Return JSON to stand inside a script element of the page."""
    return Markup(as_json(value))


def zipped(text: str) -> Markup:
    """Return a text as gzip in base64, the same for the same text."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode())


def picture(svg: str) -> str:
    """Return the address of a picture that holds it, so that its ids meet no others of the page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def texts_of(folder: Path, *names: str) -> str:
    """Return the text of files of a folder, one after another."""
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def inline_script(text: str) -> Markup:
    """Return a script to stand inside its element: nothing in it may end the element."""
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("a script of the page holds the end of a script element")
    return Markup(text)


def inline_style(text: str) -> Markup:
    """Return a style sheet to stand inside its element."""
    if "</style" in text.lower():
        raise ValueError("a style sheet of the page holds the end of a style element")
    return Markup(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value

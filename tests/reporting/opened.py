"""What a report's page holds: its data, its packed items, and its text without tags."""

import base64
import gzip
import html
import json
import re
from pathlib import Path
from typing import Any


class Page:
    """A page as text, taken apart."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.data: dict[str, Any] = json.loads(self.element("data"))
        """What the scripts read."""
        self.items: dict[str, Any] = json.loads(unpacked(self.element("packed-items")))

    @classmethod
    def of(cls, project: Path) -> "Page":
        return cls((project / "data/report/index.html").read_text())

    def element(self, name: str) -> str:
        """Return the content of a script element."""
        return re.search(rf'<script type="[\w/]+" id="{name}">(.*?)</script>', self.text, re.DOTALL)[1]

    @property
    def read(self) -> str:
        """The text that is there without scripts."""
        static = self.text[self.text.index("<body>") : self.text.index('<script type="application/json"')]
        return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", static)).split())

    def answers(self, candidate: str, place: int) -> list[dict[str, Any]]:
        """Return a candidate's answers to a measure, a dict an item, with its question."""
        measure = next(m for m in self.items["measures"] if m["measure"] == place)
        texts, given = [*self.items["texts"], None], measure["answers"][candidate]
        return [
            {
                "item": item,
                "prompt": texts[measure["prompt"][at]],
                "target": texts[measure["target"][at]],
                "response": texts[given["response"][at]],
                "score": given["score"][at],
            }
            for at, item in enumerate(measure["item"])
        ]


def unpacked(content: str) -> str:
    """Undo `stages.reporting.page.packing.zipped`."""
    return gzip.decompress(base64.b64decode(content)).decode()

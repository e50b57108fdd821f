"""A user's own instruction data: JSON Lines with a conversation a line.

A line is `{"prompt": ..., "response": ...}`, or `{"messages": [...]}` with the turns of a chat, each
`{"role": ..., "content": ...}`. After an optional system turn, user and assistant take turns, the user first
and the assistant last. Training predicts the assistant's turns alone (see `stages.corpus.examples`).
Conversations that repeat are dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from stages.core.errors import Refusal
from stages.core.lazy import pd
from stages.core.schema import Sha256
from stages.sources.dataset import Dataset
from stages.sources.documents import json_lines
from stages.sources.origin import InnerPath, Origin, fetched

_SHOWN = 4
"""Faulty lines that a refusal lists."""


class Conversations(Dataset):
    """A file of conversations inside a source."""

    kind: Literal["conversations"]
    source: Origin
    file: InnerPath = ""
    """The JSON Lines file; "" is the source itself."""
    sha256: Sha256

    def read(self) -> list[list[dict[str, str]]]:
        """Return the turns of each conversation, in order.

        Raises:
            Refusal: the file cannot be fetched or is no JSON Lines, or lines hold no conversation.
        """
        name = f"{self.source} {self.file}".rstrip()
        with fetched(self.source, self.file, self.sha256, data=True) as path:
            if not path.is_file():
                raise Refusal(f"{name} is a folder; name the JSON Lines file in it.")
            content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refusal(
                f"{name} is not UTF-8 text at byte {error.start}; save it in that encoding."
            ) from None
        chats: dict[str, list[dict[str, str]]] = {}
        faults: list[str] = []
        for number, row in json_lines(text, name):
            turns, fault = _turns(row)
            if fault:
                faults.append(f"line {number} {fault}")
            else:
                chats.setdefault(json.dumps(turns), turns)
        if faults:
            more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise Refusal(
                f"{name}: {', '.join(faults[:_SHOWN])}{more}; write a prompt and a response, or messages of "
                "user and assistant in turn, the last by the assistant."
            )
        if not chats:
            raise Refusal(f"{name} has no conversations; choose another file.")
        return list(chats.values())

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `train.parquet` with the column `messages`: the turns of each conversation, as JSON.

        Raises:
            Refusal: see `read`.
        """
        chats = self.read()
        pd.DataFrame({"messages": [json.dumps(turns) for turns in chats]}).to_parquet(
            folder / "train.parquet"
        )
        return {"conversations": len(chats), "turns": sum(map(len, chats))}


def _turns(row: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
    """Return the turns of a line and an empty text, or no turns and the fault of the line."""
    if "messages" in row:
        given = row["messages"]
    elif "prompt" in row and "response" in row:
        given = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
    else:
        return [], f"has neither prompt and response nor messages, only {', '.join(row) or 'nothing'}"
    if not isinstance(given, list) or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
        for turn in given
    ):
        return [], "has a turn without a role and content of text"
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in given]
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        return [], f"has the turns {', '.join(roles) or 'none'}"
    if not all(turn["content"].strip() for turn in turns if turn["role"] == "assistant"):
        return [], "has an empty response"
    return turns, ""

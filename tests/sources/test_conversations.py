"""Conversations: both forms of a line, and every faulty line in one refusal."""

import json
from pathlib import Path

import pandas as pd
import pytest

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources.conversations import Conversations

PAIR = {"prompt": "Is ice cold?", "response": "Yes."}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is ice cold?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And fire?"},
    {"role": "assistant", "content": "No."},
]


def conversations(folder: Path, *lines: object) -> Conversations:
    """A file with these lines, as JSON unless they are text."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "chats.jsonl").write_text("\n".join(texts) + "\n")
    hashed = sha256(folder / "chats.jsonl")
    return Conversations(kind="conversations", source=f"path:{folder}", file="chats.jsonl", sha256=hashed)


def test_both_forms_are_turns_and_repeats_are_dropped(tmp_path):
    data = conversations(tmp_path, PAIR, "", {"messages": CHAT, "id": 3}, PAIR)
    assert data.write(tmp_path) == {"conversations": 2, "turns": 7}
    rows = pd.read_parquet(tmp_path / "train.parquet")["messages"]
    assert [json.loads(row) for row in rows] == [CHAT[1:3], CHAT]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2 is not JSON"),
        ({"text": "a"}, "line 2 has neither prompt and response nor messages, only text"),
        ({"prompt": "a", "response": " "}, "line 2 has an empty response"),
        ({"prompt": "a", "response": None}, "line 2 has a turn without a role and content of text"),
        ({"messages": CHAT[:2]}, "line 2 has the turns system, user"),
        ({"messages": CHAT[2:]}, "line 2 has the turns assistant, user, assistant"),
        ({"messages": []}, "line 2 has the turns none"),
        ({"messages": "a"}, "line 2 has a turn without"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line, fault, tmp_path):
    with pytest.raises(Refusal, match=fault):
        conversations(tmp_path, PAIR, line).read()


def test_all_faulty_lines_are_in_one_refusal(tmp_path):
    with pytest.raises(Refusal) as caught:
        conversations(tmp_path, *[{"prompt": "a"}] * 6).read()
    assert all(f"line {number} has" in str(caught.value) for number in (1, 2, 3, 4))
    assert ", and 2 more; write a prompt and a response" in str(caught.value)


def test_an_empty_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(Refusal, match=r"chats.jsonl has no conversations; choose another file"):
        conversations(tmp_path, "").read()
    whole = Conversations(kind="conversations", source=f"path:{tmp_path}", sha256=sha256(tmp_path))
    with pytest.raises(Refusal, match="is a folder; name the JSON Lines file in it"):
        whole.read()

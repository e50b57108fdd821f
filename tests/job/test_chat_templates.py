"""Chats and chat templates are matched before anything runs."""

import json
import shutil
from pathlib import Path

import pytest

from stages.core.files import sha256
from stages.job.checks.chat_templates import of_chat_templates
from stages.job.load import checked_params
from tests import project

TURNS = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Params whose finetune reads chats, each of several turns."""
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path / "inputs")
    values = project.params(tmp_path / "inputs")
    Path("chats.jsonl").write_text("".join(f"{json.dumps({'messages': TURNS})}\n" for _ in range(3)))
    chats = {"kind": "conversations", "source": "path:chats.jsonl", "sha256": sha256(Path("chats.jsonl"))}
    values["datasets"]["chats"] = chats
    train = {"dataset": "chats", "num_samples": 2, "held_out": 1}
    values["finetune"]["wanda-50-lora"]["train"] = train
    return values


def without_template(raw: dict) -> None:
    """Let the model have a tokenizer without a template."""
    source = Path(raw["models"]["tiny"]["source"].removeprefix("path:"))
    shutil.copytree(source, "silent")
    Path("silent/chat_template.jinja").unlink(missing_ok=True)
    file = Path("silent/tokenizer_config.json")
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))
    raw["models"]["tiny"] |= {"source": "path:silent", "sha256": sha256(Path("silent"))}


@pytest.mark.parametrize(
    ("asked", "has", "sentence"),
    [
        (True, False, "chat_template: true given, but the tokenizer of base/tiny has no chat template; set"),
        (False, False, "chat template can write; keep one prompt and one response a line"),
        (False, True, "chat template can write; set it to true"),
        (True, True, None),
    ],
)
def test_a_template_is_there_where_it_is_needed(asked, has, sentence, raw):
    if not has:
        without_template(raw)
    raw["finetune"]["wanda-50-lora"]["train"]["chat_template"] = asked
    mistakes = list(of_chat_templates(checked_params(raw)))
    assert len(mistakes) == (sentence is not None)
    assert all(m.startswith("finetune.wanda-50-lora.train.chat_template") for m in mistakes)
    assert all(sentence in mistake for mistake in mistakes)


def test_single_questions_and_responses_need_no_template(raw):
    Path("chats.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    raw["datasets"]["chats"]["sha256"] = sha256(Path("chats.jsonl"))
    assert list(of_chat_templates(checked_params(raw))) == []


def test_a_suite_that_asks_for_a_template_needs_one(raw):
    del raw["datasets"]["chats"], raw["finetune"]["wanda-50-lora"]
    raw["evaluate"]["candidates"] = ["base/tiny"]
    raw["suites"]["graded"]["arithmetic"]["chat_template"] = True
    assert list(of_chat_templates(checked_params(raw))) == []
    without_template(raw)
    (mistake,) = of_chat_templates(checked_params(raw))
    assert mistake.startswith("suites: arithmetic has chat_template: true, but the tokenizer of base/tiny")

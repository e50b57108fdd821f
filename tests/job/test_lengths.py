"""A conversation that does not fit is named before anything runs, as the stage would, and tokenized once."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.corpus.examples import load_examples
from stages.job.checks import counts, lengths
from stages.job.checks.lengths import LONGEST, of_lengths
from stages.job.load import checked_params, load_verified
from tests import families, project

SHORT, LONG, ENDLESS = "yes", "yes " * 20, "yes " * 80


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Params whose finetune takes three of five conversations into rows of 60 tokens."""
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path / "inputs")
    values = project.params(tmp_path / "inputs")
    values["datasets"]["chats"] = {"kind": "conversations", "source": "path:chats.jsonl"}
    values["finetune"]["wanda-50-lora"]["train"] = {
        "dataset": "chats", "num_samples": 2, "held_out": 1, "chat_template": True, "sequence_length": 60,
    }  # fmt: skip
    write(values, [SHORT] * 5)
    return values


def write(raw: dict, responses: list[str]) -> None:
    """Write a conversation a response; the first stands there twice and counts once."""
    rows = [{"prompt": f"question {place}", "response": text} for place, text in enumerate(responses, 1)]
    Path("chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [rows[0], *rows]))
    raw["datasets"]["chats"]["sha256"] = sha256(Path("chats.jsonl"))


def load_in_the_stage(raw: dict) -> None:
    """Do what the stage does with the conversations."""
    params = checked_params(raw)
    params.datasets["chats"].download("chats")
    config = AutoConfig.from_pretrained("inputs/tiny")
    load_examples(params.finetune["wanda-50-lora"].train, families.tokenizer(), config)


def test_check_refuses_the_conversations_that_the_stage_refuses(raw):
    refused = []
    for place in range(1, 6):
        write(raw, [LONG if place == other else SHORT for other in range(1, 6)])
        mistakes = list(of_lengths(checked_params(raw)))
        if not mistakes:
            load_in_the_stage(raw)
            continue
        refused.append(place)
        assert mistakes == [
            f"finetune.wanda-50-lora.train.sequence_length: 60 given, but conversation {place} of data set "
            f"chats, which begins 'question {place}', has 109 tokens of base/tiny; raise it to 109, or "
            "shorten or remove that conversation."
        ]
        with pytest.raises(Refusal, match="an example has 109 tokens, but sequence_length is 60"):
            load_in_the_stage(raw)
    assert len(refused) == 3


def test_a_conversation_that_the_model_cannot_read_is_refused(raw):
    write(raw, [ENDLESS] * 5)
    raw["finetune"]["wanda-50-lora"]["train"]["sequence_length"] = 512
    (mistake,) = of_lengths(checked_params(raw))
    assert mistake.startswith("finetune.wanda-50-lora.train.dataset: conversation 1 of data set chats, which")
    assert mistake.endswith("but base/tiny reads 256 at most; shorten or remove that conversation.")


def test_it_is_refused_before_anything_runs(raw):
    write(raw, [LONG] * 5)
    project.write(Path(), raw)
    with pytest.raises(Refusal, match="has 109 tokens of base/tiny"):
        load_verified()
    assert not Path("data/datasets").exists()


def test_conversations_are_tokenized_once(raw, monkeypatch):
    write(raw, [LONG] * 5)
    before, kept = list(of_lengths(checked_params(raw))), LONGEST.read_text()
    raw["finetune"]["wanda-50-lora"]["train"]["sequence_length"] = 109
    with monkeypatch.context() as patch:
        patch.setattr(lengths, "chat_example", lambda *_: pytest.fail("tokenized again"))
        assert before and list(of_lengths(checked_params(raw))) == []
    assert LONGEST.read_text() == kept
    write(raw, [ENDLESS] * 5)
    assert "reads 256 at most" in next(of_lengths(checked_params(raw)))


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ '-' * 70 }}", "has 70 tokens of base/tiny; raise it to 70"),
        (
            "{{ raise_exception('no user') }}",
            "the chat template of the model's tokenizer fails on turns of user",
        ),
    ],
)
def test_another_chat_template_gives_other_tokens(template, sentence, raw):
    assert list(of_lengths(checked_params(raw))) == []
    Path("inputs/tiny/chat_template.jinja").write_text(template)
    raw["models"]["tiny"]["sha256"] = sha256(Path("inputs/tiny"))
    counts.tokenizer_of.cache_clear()
    (mistake,) = of_lengths(checked_params(raw))
    assert sentence in mistake


def test_what_is_not_here_is_left_to_the_stage(raw, monkeypatch):
    write(raw, [LONG] * 5)
    settings = raw["datasets"]["chats"]
    here = settings["source"], settings["sha256"]
    checked_params(raw).datasets["chats"].download("chats")
    settings["source"] = "hub:org/chats@" + "0" * 40
    assert list(of_lengths(checked_params(raw))) == []
    record = Path("data/datasets/chats/dataset.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"source": settings["source"]}))
    assert "has 109 tokens" in next(of_lengths(checked_params(raw))), "it is downloaded"
    settings["source"], settings["sha256"] = here
    monkeypatch.setattr(counts, "LARGEST_TEXT", 10)
    assert list(of_lengths(checked_params(raw))) == []

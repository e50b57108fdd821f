"""Answers: the teacher's own, cut where they end, from prompts that only the teacher sees in full."""

from typing import Any

import pandas as pd
import pytest

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.corpus import decoding
from stages.corpus.examples import few_shot_text
from stages.job.load import checked_params
from stages.teaching.answers import cut_answer
from tests import families, lessons, pipeline
from tests.lessons import ANSWERS, answer, greedy, make_lesson, prompt
from tests.pipeline import download, teach

pytestmark = [pytest.mark.usefixtures("workspace"), pytest.mark.numerics, pytest.mark.device]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_the_teachers_likeliest_tokens(batch_size):
    make_lesson(batch_size=batch_size)
    model = pipeline.load("base/tiny").float()
    train, held_out = lessons.read()
    assert (len(train), len(held_out)) == (6, 2)
    for example in train + held_out:
        assert answer(example) == greedy(model, prompt(example), 6)
    questions = {families.tokenizer().decode(prompt(example)) for example in train}
    assert len(questions) == 6 and all(text.endswith(" =") for text in questions)


def test_only_the_teacher_sees_the_few_shot_examples(monkeypatch):
    """The teacher continues few-shot examples and a question; the question and its answer are stored."""
    with pytest.raises(Refusal, match=r"teach\.lesson\.shots"):
        make_lesson(shots=3)
    raw = lessons.params(lesson=ANSWERS).model_dump(mode="json")
    raw["datasets"]["sums"]["fewshot"] = 2
    raw["teach"]["lesson"]["shots"] = 3
    chosen = checked_params(raw)
    for name in ("datasets/sums", "base/tiny"):
        download(chosen, name)
    with pytest.raises(Refusal, match="sums has 4 few-shot examples, fewer than 5; lower shots"):
        few_shot_text("sums", 5)
    seen: list[list[int]] = []
    generate = decoding.generate_answers

    def spy(model: Any, prompts: list[list[int]], *rest: Any) -> list[list[int]]:
        seen.extend(prompts)
        return generate(model, prompts, *rest)

    monkeypatch.setattr(decoding, "generate_answers", spy)
    teach(chosen, "lesson")
    model, tokenizer = pipeline.load("base/tiny").float(), families.tokenizer()
    rows = pd.read_parquet(DATASETS / "sums/fewshot.parquet").to_dict("records")
    shots = "".join(f"{row['question']} {row['answer']}\n" for row in rows[:3])
    examples = [example for split in lessons.read() for example in split]
    for example, shown in zip(examples, seen, strict=True):
        question = tokenizer.decode(prompt(example))
        assert "\n" not in question and question.endswith(" =")
        assert shown == tokenizer.encode(shots + question)
        assert answer(example) == greedy(model, shown, 6)


@pytest.mark.parametrize(
    ("text", "until", "cut"),
    [
        (" 12<eos><eos><eos>", None, " 12<eos>"),
        (" 12\n\n3", "\n", " 12<eos>"),
        (" 12; 3\n\nQ: 4", "\n\nQ:", " 12; 3<eos>"),
        (" 12<eos>\n", "\n", " 12<eos>"),
        (" 123", "\n", " 123"),
    ],
)
def test_an_answer_ends_after_the_end_of_text_or_before_until(text, until, cut):
    tokenizer = families.tokenizer()
    tokens = cut_answer(tokenizer.encode(text), [tokenizer.eos_token_id], until, tokenizer)
    assert tokenizer.decode(tokens) == cut


def test_questions_and_answers_longer_than_the_teachers_context_are_refused():
    with pytest.raises(Refusal, match=r"take \d+ tokens, but base/tiny reads at most 256; lower max_new_tok"):
        make_lesson(max_new_tokens=256)

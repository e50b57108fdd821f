"""Drawn answers: they follow the teacher's distribution, at numbers that the seed alone decides."""

import pytest
import torch

from stages.corpus.rows import collate
from stages.recovery.objective import predictions
from tests import lessons, pipeline
from tests.lessons import answer, make_lesson

pytestmark = [pytest.mark.usefixtures("workspace"), pytest.mark.numerics]


def test_drawn_answers_depend_on_the_seed_and_not_on_the_batch_size():
    answers = []
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "seed": 1}):
        make_lesson(temperature=1.0, **options)
        answers.append([answer(example) for example in lessons.read()[0]])
    assert answers[0] == answers[1] != answers[2]


def test_a_drawn_answer_follows_the_teachers_distribution():
    make_lesson(temperature=0.7, max_new_tokens=1, num_samples=8, held_out=4)
    model = pipeline.load("base/tiny").float()
    uniform = torch.rand(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    train, held_out = lessons.read()
    for example, number in zip(train + held_out, uniform, strict=True):
        with torch.no_grad():
            logits, _ = predictions(model, collate([(example,)]))
        total = (logits[0].double() / 0.7).softmax(0).cumsum(0)
        assert answer(example) == [int((total <= number).sum())]

"""Drawn answers: they follow the teacher's distribution, at numbers that the seed alone decides."""

import pytest
import torch

from stages.core.errors import Refusal
from stages.corpus.rows import collate
from stages.recovery.objective import predictions
from tests import lessons, pipeline
from tests.lessons import answer, make_lesson

pytestmark = [pytest.mark.usefixtures("workspace"), pytest.mark.numerics, pytest.mark.device]


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


def test_only_tokens_of_the_nucleus_are_drawn():
    """The expected token is drawn by hand among the fewest tokens that reach the share."""
    make_lesson(temperature=2.0, top_p=0.4, max_new_tokens=1, num_samples=8, held_out=4)
    model = pipeline.load("base/tiny").float()
    uniform = torch.rand(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    train, held_out = lessons.read()
    outside = 0
    for example, number in zip(train + held_out, uniform, strict=True):
        with torch.no_grad():
            logits, _ = predictions(model, collate([(example,)]))
        shares = (logits[0].double() / 2.0).softmax(0)
        ordered = shares.sort(descending=True)
        count = int((ordered.values.cumsum(0) < 0.4).sum()) + 1
        nucleus = torch.zeros_like(shares).index_copy(0, ordered.indices[:count], ordered.values[:count])
        total = nucleus.cumsum(0) / nucleus.sum()
        assert answer(example) == [int((total <= number).sum())]
        outside += int((shares.cumsum(0) <= number).sum()) not in ordered.indices[:count].tolist()
    assert outside  # without top_p, some token would have come from outside


def test_a_nucleus_without_a_temperature_is_refused():
    with pytest.raises(Refusal, match=r"top_p 0\.9 needs a temperature above 0"):
        make_lesson(top_p=0.9)

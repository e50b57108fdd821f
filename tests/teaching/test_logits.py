"""Logits: the teacher's own, on the examples that would be trained on without it."""

import pytest
import torch

from stages.corpus.examples import Train, load_examples
from stages.corpus.rows import IGNORED, Batch, collate
from stages.model.artifact import load_tokenizer
from stages.recovery.objective import batch_loss
from stages.recovery.tuning import Distillation
from tests import families, lessons, pipeline
from tests.lessons import answer, make_lesson

pytestmark = [pytest.mark.usefixtures("workspace"), pytest.mark.numerics, pytest.mark.device]


@pytest.mark.parametrize("top", [1, 8, None])
def test_logits_are_the_teachers_own(top):
    make_lesson(method="logits", top=top)
    model = pipeline.load("base/tiny").float()
    train, held_out = lessons.read()
    assert (len(train), len(held_out)) == (5, 3) and all(example.teacher is None for example in held_out)
    for example in train:
        with torch.no_grad():
            expected = model(input_ids=example.input_ids[None]).logits[0, :-1].log_softmax(1)
        count = top or families.VOCAB
        stored = example.teacher.log_probabilities
        for likeliest in (expected.gather(1, example.teacher.tokens), expected.topk(count).values):
            torch.testing.assert_close(stored[:, :count], likeliest, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stored.exp().sum(1), torch.ones(23))
        assert stored.shape[1] == (families.VOCAB if top is None else count + 1)


def test_a_student_equal_to_its_teacher_learns_from_the_text_alone():
    make_lesson(method="logits")
    train = Train(dataset="lesson", num_samples=5, held_out=3, sequence_length=24)
    model = pipeline.load("base/tiny").float()
    batch = collate(load_examples(train, load_tokenizer("base/tiny"), model.config).train)
    plain, _ = batch_loss(model, batch, None)
    torch.testing.assert_close(
        batch_loss(model, batch, Distillation(weight=3.0))[0], plain, rtol=1e-5, atol=1e-5
    )


def test_examples_are_those_that_would_be_trained_on_without_a_teacher():
    for dataset, options in (("news", {}), ("sums", {"difficulty": "hard", "num_samples": 4})):
        make_lesson(method="logits", dataset=dataset, **options)
        wanted = {"num_samples": 5, "held_out": 3, "sequence_length": 24} | options
        plain, taught = (
            load_examples(
                Train(dataset=name, **wanted), load_tokenizer("base/tiny"), families.CONFIGS["llama"]
            )
            for name in (dataset, "lesson")
        )
        for rows, others in ((plain.train, taught.train), (plain.held_out, taught.held_out)):
            for (example,), (other,) in zip(rows, others, strict=True):
                assert torch.equal(example.input_ids, other.input_ids)
                assert torch.equal(example.labels, other.labels)


def test_answers_can_be_taught_with_logits():
    """Such a student learns from its teacher's answers and distributions at once."""
    lessons.make(lessons.params(**lessons.TWICE))
    for example, before in zip(lessons.read()[0], lessons.read("answered")[0], strict=True):
        assert torch.equal(example.labels, before.labels)
        assert len(example.teacher.tokens) == int((example.labels != IGNORED).sum())
        assert int(example.teacher.tokens[0, 0]) == answer(example)[0]  # answers are greedy


def test_batches_carry_the_teacher():
    make_lesson(method="logits")
    batch = collate([(example,) for example in lessons.read()[0]])
    assert isinstance(batch, Batch) and batch.teacher.tokens.shape == (5 * 23, 8)

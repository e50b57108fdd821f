"""The loss of a batch: packing, padding and a teacher change nothing but the order of its sums."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, Lfm2Config

from stages.core.errors import Refusal
from stages.corpus.rows import IGNORED, Example, collate, example, pack
from stages.recovery.objective import batch_loss, check_packing, divergence, predictions
from stages.recovery.tuning import Distillation
from stages.teaching.logits import top_logits
from tests import families, generators

pytestmark = [pytest.mark.numerics, pytest.mark.device]
SIZES = [(30, 20), (17, 1), (9, 5), (26, 3), (12, 11), (7, 6), (3, 2)]
"""Tokens of each example, and the place where its answer starts."""


def examples(longest: int = 30) -> list[Example]:
    draw = torch.Generator().manual_seed(3)
    return [
        example(torch.randint(256, (size,), generator=draw), start)
        for size, start in SIZES
        if size <= longest
    ]


def short(family: str) -> list[Example]:
    """Return examples no longer than the family's sliding window."""
    return examples(getattr(families.CONFIGS[family], "sliding_window", None) or 30)


def losses(model: torch.nn.Module, row: tuple[Example, ...]) -> list[Tensor]:
    """Return the nats of the predicted tokens of each example of a row."""
    logits, targets = predictions(model, collate([row]))
    nats = -logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    return list(nats.split([int((item.labels != IGNORED).sum()) for item in row]))


@pytest.mark.parametrize("name", generators.NAMES)
def test_rows_of_a_batch_are_predicted_as_alone(name):
    """Some rows are longer than the length where the frequencies of LongRoPE change, some are not."""
    model, rows = generators.model(name), [(item,) for item in examples()]
    together, targets = predictions(model, collate(rows))
    alone, expected = zip(*(predictions(model, collate([row])) for row in rows), strict=True)
    assert torch.equal(targets, torch.cat(expected))
    torch.testing.assert_close(together, torch.cat(alone), rtol=2e-3, atol=2e-3)


def test_rows_on_both_sides_of_a_switch_train_as_they_do_alone():
    model, rows = generators.model("phi3"), [(item,) for item in examples()]
    predicted = collate(rows).predicted
    gradients = []
    for batches in ([collate(rows)], [collate([row]) for row in rows]):
        for batch in batches:
            mean, count = batch_loss(model, batch, None)
            (mean * (count / predicted)).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_packed_row_with_examples_on_both_sides_of_a_switch_is_refused():
    model = generators.model("phi3")
    short = [(item,) for item in examples() if len(item.input_ids) <= 20]
    packed = pack([item for (item,) in short], 60)
    assert max(sum(len(item.input_ids) for item in row) for row in packed) > 20
    check_packing(model, packed)
    with pytest.raises(Refusal, match=r"has an example longer than 20 tokens, .* at most 20\.$"):
        check_packing(model, pack(examples(), 60))


def test_packed_rows_of_short_examples_are_predicted_as_alone():
    """Beside a row with a longer example, which another set of frequencies reads."""
    model = generators.model("phi3")
    short, long = (
        [item for item in examples() if (len(item.input_ids) <= 20) == fits] for fits in (True, False)
    )
    rows = [tuple(short[:3]), (long[0],)]
    together, targets = predictions(model, collate(rows))
    alone, expected = zip(*(predictions(model, collate([(i,)])) for row in rows for i in row), strict=True)
    assert torch.equal(targets, torch.cat(expected))
    torch.testing.assert_close(together, torch.cat(alone), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_packing_changes_no_examples_loss(family):
    model = families.model(family).float()
    rows = pack(short(family), 40)
    assert max(map(len, rows)) > 1
    for row in rows:
        for item, packed in zip(row, losses(model, row), strict=True):
            torch.testing.assert_close(packed, *losses(model, (item,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_family_that_keeps_packed_examples_apart_is_served(family):
    check_packing(families.model(family), pack(short(family), 48))


@pytest.mark.parametrize("config", [Lfm2Config, BloomConfig])
def test_a_family_that_mixes_packed_examples_is_refused(config):
    """Convolutions run past the end of a text, and some attention takes no such mask."""
    sizes = {
        Lfm2Config: {
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
        },
        BloomConfig: {"n_layer": 2, "n_head": 4},
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(vocab_size=families.VOCAB, hidden_size=32, **sizes[config])
    )
    with pytest.raises(Refusal, match=f"{type(model).__name__} does not keep .*packing: false"):
        check_packing(model, pack(examples(), 64))
    check_packing(model, [(item,) for item in examples()])  # rows of one example are served


@pytest.mark.parametrize("family", families.CONFIGS)
def test_padding_and_packing_together_change_no_loss(family):
    model = families.model(family).float()
    alone = torch.cat([losses(model, (item,))[0] for item in short(family)])
    for rows in ([(item,) for item in short(family)], pack(short(family), 40)):
        loss, count = batch_loss(model, collate(rows), None)
        assert count == len(alone)
        torch.testing.assert_close(loss, alone.mean(), rtol=1e-5, atol=1e-5)


def test_the_loss_of_whole_windows_is_that_of_transformers():
    model = families.model("llama").float()
    windows = families.windows(3, 24)
    expected = model(input_ids=windows, labels=windows).loss
    loss, count = batch_loss(model, collate([(example(row),) for row in windows.cpu()]), None)
    assert count == 3 * 23
    torch.testing.assert_close(loss, expected)


def coarse(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return fp64 log-probabilities of the tokens and of all others as one, tempered as these outcomes."""
    rows = []
    for row, chosen in zip(logits.double().softmax(-1), tokens, strict=True):
        rest = [p for i, p in enumerate(row.tolist()) if i not in set(chosen.tolist())]
        outcomes = torch.cat([row[chosen], torch.tensor([sum(rest)] if rest else [], dtype=torch.float64)])
        rows.append(outcomes ** (1 / temperature) / (outcomes ** (1 / temperature)).sum())
    return torch.stack(rows).log()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top", [1, 5, 40, None])
def test_the_divergence_is_over_the_teachers_outcomes(top, temperature):
    torch.manual_seed(0)
    teacher, student = (3 * torch.randn(2, 6, 40)).unbind(0)
    stored = top_logits(teacher, top)
    p, q = (coarse(logits, stored.tokens, temperature) for logits in (teacher, student))
    expected = (p.exp() * (p - q)).sum(1).mean()
    torch.testing.assert_close(divergence(student, stored, temperature), expected.float())
    if top in (40, None):  # the whole vocabulary, as Hinton has it
        p, q = ((logits.double() / temperature).log_softmax(1) for logits in (teacher, student))
        torch.testing.assert_close(
            divergence(student, stored, temperature).double(),
            (p.exp() * (p - q)).sum(1).mean(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_the_divergence_grows_with_the_teachers_tokens():
    torch.manual_seed(0)
    teacher, student = (3 * torch.randn(2, 6, 40)).unbind(0)
    by_top = [float(divergence(student, top_logits(teacher, top), 1.0)) for top in (1, 4, 16, 39, 40)]
    assert by_top == sorted(by_top) and by_top[0] > 0


@pytest.mark.parametrize("top", [3, None])
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(top):
    torch.manual_seed(0)
    logits = torch.randn(6, 40, requires_grad=True)
    distance = divergence(logits, top_logits(logits.detach(), top), 1.5)
    distance.backward()
    assert abs(float(distance.detach())) < 1e-6 and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("top", [4, None])
def test_a_student_may_have_more_outputs_than_its_teacher(top):
    """Padding of its last layer counts as outcomes of probability 0, from which training draws it away."""
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 30), torch.randn(5, 34)
    stored = top_logits(teacher, top)
    wide = torch.cat([teacher, torch.full((5, 4), -1e4)], 1)
    torch.testing.assert_close(
        divergence(student, stored, 1.0), divergence(student, top_logits(wide, top), 1.0)
    )
    tighter = student.clone()
    tighter[:, 30:] -= 5
    assert divergence(tighter, stored, 1.0) < divergence(student, stored, 1.0)


def test_the_divergence_is_finite_where_tokens_have_almost_no_probability():
    teacher = torch.tensor([[200.0, 0.0, -200.0, 1.0]])
    student = teacher.flip(1).clone().requires_grad_()
    distance = divergence(student, top_logits(teacher, 2), 1.0)
    distance.backward()
    assert distance.isfinite() and distance > 100 and student.grad.isfinite().all()


def test_distillation_is_added_by_weight_and_squared_temperature():
    model, draw = families.model("llama").float(), torch.Generator().manual_seed(1)
    taught = []
    for item in examples():
        logits = torch.randn(int((item.labels != IGNORED).sum()), families.VOCAB, generator=draw)
        taught.append(Example(item.input_ids, item.labels, top_logits(logits, 8)))
    batch = collate(pack(taught, 40))
    plain, _ = batch_loss(model, batch, None)
    total = sum(
        divergence(predictions(model, collate([(item,)]))[0].cpu(), item.teacher, 2.0)
        * (item.labels != IGNORED).sum()
        for item in taught
    )
    loss, _ = batch_loss(model, batch, Distillation(weight=0.5, temperature=2.0))
    expected = plain.cpu() + 0.5 * 4 * total / batch.predicted
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_distillation_needs_a_teacher():
    with pytest.raises(ValueError, match="a batch with a teacher"):
        batch_loss(families.model("llama"), collate([(examples()[0],)]), Distillation())

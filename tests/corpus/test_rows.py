"""Batches and their loss: packing, padding and a teacher change nothing but the arithmetic's order."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, Lfm2Config

from stages.core.errors import Refusal
from stages.corpus.rows import IGNORED, Example, TopLogits, collate, example, pack
from stages.recovery.objective import check_packing, divergence, loss, predictions
from stages.recovery.tuning import Distillation
from stages.teaching.logits import likeliest
from tests import families

SIZES = [(30, 20), (17, 1), (9, 5), (26, 3), (12, 11), (7, 6), (3, 2)]
"""Tokens of each example, and where its answer starts."""


def examples(longest: int = 30) -> list[Example]:
    draw = torch.Generator().manual_seed(3)
    return [
        example(torch.randint(256, (size,), generator=draw), start)
        for size, start in SIZES
        if size <= longest
    ]


def short(family: str) -> list[Example]:
    """Examples no longer than the family's sliding window."""
    return examples(getattr(families.CONFIGS[family], "sliding_window", None) or 30)


def losses(model: torch.nn.Module, row: tuple[Example, ...]) -> list[Tensor]:
    """Nats of the predicted tokens of each example of a row."""
    logits, wanted = predictions(model, collate([row]))
    nats = -logits.log_softmax(1).gather(1, wanted[:, None]).squeeze(1)
    return list(nats.split([int((one.labels != IGNORED).sum()) for one in row]))


@pytest.mark.parametrize("family", families.CONFIGS)
def test_an_example_has_the_loss_it_has_alone_where_it_is_packed(family):
    model = families.model(family).float()
    rows = pack(short(family), 40)
    assert max(map(len, rows)) > 1
    for row in rows:
        for one, packed in zip(row, losses(model, row), strict=True):
            torch.testing.assert_close(packed, *losses(model, (one,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_family_that_keeps_packed_examples_apart_is_served(family):
    check_packing(families.model(family), pack(short(family), 48))


@pytest.mark.parametrize("config", [Lfm2Config, BloomConfig])
def test_a_family_that_mixes_packed_examples_is_refused(config):
    """Convolutions that run over the end of a text, and attention that takes no such mask."""
    sizes = {
        Lfm2Config: {
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
        },
        BloomConfig: {"n_layer": 2, "n_head": 4},
    }  # fmt: skip
    torch.manual_seed(0)
    made = config(vocab_size=families.VOCAB, hidden_size=32, **sizes[config])
    model = AutoModelForCausalLM.from_config(made)
    with pytest.raises(Refusal, match=f"{type(model).__name__} does not keep .*; say packing: false"):
        check_packing(model, pack(examples(), 64))
    check_packing(model, [(one,) for one in examples()])  # rows of one example are served


@pytest.mark.parametrize("family", families.CONFIGS)
def test_padding_and_packing_together_change_no_loss(family):
    model = families.model(family).float()
    alone = [losses(model, (one,))[0] for one in short(family)]
    for rows in ([(one,) for one in short(family)], pack(short(family), 40)):
        batch = collate(rows)
        assert batch.predicted == sum(map(len, alone)) and batch.tokens == sum(map(_size, short(family)))
        assert (
            batch.input_ids.shape == batch.labels.shape == (len(rows), max(sum(map(_size, r)) for r in rows))
        )
        found, count = loss(model, batch, None)
        assert count == batch.predicted
        torch.testing.assert_close(found, torch.cat(alone).mean(), rtol=1e-5, atol=1e-5)


def _size(one: Example) -> int:
    return len(one.input_ids)


def test_the_loss_of_whole_windows_is_that_of_transformers():
    model = families.model("llama").float()
    windows = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=windows, labels=windows).loss
    found, count = loss(model, collate([(example(row),) for row in windows]), None)
    assert count == 3 * 23
    torch.testing.assert_close(found, expected)


def test_packing_keeps_every_example_in_rows_that_fit():
    rows = pack(examples(), 40)
    together = [one.input_ids.tolist() for row in rows for one in row]
    assert sorted(together) == sorted(one.input_ids.tolist() for one in examples())
    assert all(sum(map(_size, row)) <= 40 for row in rows)
    # Two rows that would fit into one were not packed.
    sizes = sorted(sum(map(_size, row)) for row in rows)
    assert all(a + b > 40 for i, a in enumerate(sizes) for b in sizes[i + 1 :])


def test_the_first_token_of_an_example_is_never_predicted():
    assert example(torch.tensor([5, 6, 7]), 0).labels.tolist() == [IGNORED, 6, 7]


def coarse(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the tokens and of all others together, fp64, at a temperature applied to these."""
    found = logits.double().softmax(-1)
    rows = []
    for row, chosen in zip(found, tokens, strict=True):
        named = row[chosen]
        rest = [p for i, p in enumerate(row.tolist()) if i not in set(chosen.tolist())]
        whole = torch.cat([named, torch.tensor([sum(rest)], dtype=torch.float64)]) if rest else named
        rows.append(whole ** (1 / temperature) / (whole ** (1 / temperature)).sum())
    return torch.stack(rows).log()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top", [1, 5, 40, None])
def test_the_divergence_is_that_of_what_the_teacher_tells_apart(top, temperature):
    torch.manual_seed(0)
    teacher, student = (3 * torch.randn(2, 6, 40)).unbind(0)
    kept = likeliest(teacher, top)
    p, q = (coarse(one, kept.tokens, temperature) for one in (teacher, student))
    expected = (p.exp() * (p - q)).sum(1).mean()
    torch.testing.assert_close(divergence(student, kept, temperature), expected.float())
    if top in (40, None):  # the whole vocabulary, as Hinton has it
        p, q = ((one.double() / temperature).log_softmax(1) for one in (teacher, student))
        torch.testing.assert_close(
            divergence(student, kept, temperature).double(),
            (p.exp() * (p - q)).sum(1).mean(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_fewer_tokens_of_a_teacher_never_tell_more():
    torch.manual_seed(0)
    teacher, student = (3 * torch.randn(2, 6, 40)).unbind(0)
    told = [float(divergence(student, likeliest(teacher, top), 1.0)) for top in (1, 4, 16, 39, 40)]
    assert told == sorted(told) and told[0] > 0


@pytest.mark.parametrize("top", [3, None])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(top):
    torch.manual_seed(0)
    logits = torch.randn(6, 40, requires_grad=True)
    apart = divergence(logits, likeliest(logits.detach(), top), 1.5)
    apart.backward()
    assert abs(float(apart.detach())) < 1e-6 and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("top", [4, None])
def test_a_student_may_have_more_outputs_than_its_teacher(top):
    """Padding of its last layer: outcomes of no probability, which it is drawn away from."""
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 30), torch.randn(5, 34)
    kept = likeliest(teacher, top)
    wide = torch.cat([teacher, torch.full((5, 4), -1e4)], 1)
    torch.testing.assert_close(divergence(student, kept, 1.0), divergence(student, likeliest(wide, top), 1.0))
    tighter = student.clone()
    tighter[:, 30:] -= 5
    assert divergence(tighter, kept, 1.0) < divergence(student, kept, 1.0)


def test_a_token_of_almost_no_probability_leaves_the_divergence_a_number():
    teacher = torch.tensor([[200.0, 0.0, -200.0, 1.0]])
    student = teacher.flip(1).clone().requires_grad_()
    apart = divergence(student, likeliest(teacher, 2), 1.0)
    apart.backward()
    assert apart.isfinite() and apart > 100 and student.grad.isfinite().all()


def test_distillation_is_added_by_weight_and_squared_temperature():
    model, draw = families.model("llama").float(), torch.Generator().manual_seed(1)
    taught = []
    for one in examples():
        said = torch.randn(int((one.labels != IGNORED).sum()), families.VOCAB, generator=draw)
        taught.append(Example(one.input_ids, one.labels, likeliest(said, 8)))
    batch = collate(pack(taught, 40))
    plain, _ = loss(model, batch, None)
    apart = (
        torch.cat(
            [
                divergence(predictions(model, collate([(one,)]))[0], one.teacher, 2.0)[None]
                * (one.labels != IGNORED).sum()
                for one in taught
            ]
        ).sum()
        / batch.predicted
    )
    found, _ = loss(model, batch, Distillation(weight=0.5, temperature=2.0))
    torch.testing.assert_close(found, plain + 0.5 * 4 * apart, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_some_examples_only_is_a_bug():
    first, second, *_ = examples()
    told = TopLogits(torch.zeros(10, 1, dtype=torch.long), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="its word on every example"):
        collate([(Example(first.input_ids, first.labels, told),), (second,)])
    with pytest.raises(ValueError, match="needs a batch with a teacher"):
        loss(families.model("llama"), collate([(first,)]), Distillation())

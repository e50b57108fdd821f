"""The training loop: rows, accumulation, clipping, held-out loss and refusals."""

from pathlib import Path

import pytest
import torch

from stages.core.errors import Refusal
from stages.corpus.examples import Examples
from stages.corpus.rows import example
from stages.recovery import objective
from stages.recovery.arm import Arm, Recovered
from stages.recovery.training import StepPlan, held_out_loss, refusing_out_of_memory
from tests import families
from tests.tuned import recipe, rows, run, tune

pytestmark = [pytest.mark.numerics, pytest.mark.device]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def exact(family: str = "llama") -> torch.nn.Module:
    """Make a model in fp32, so that the order of sums hardly matters, and without dropout."""
    model = families.model(family).float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def uneven() -> list:
    """Make eight rows of different lengths, with different parts to predict."""
    return [
        (example(torch.arange(8 + 2 * number).remainder(7), start=1 + number % 4),) for number in range(8)
    ]


def test_every_row_is_seen_before_any_repeats():
    plan = StepPlan(recipe("full", steps=5, batch_size=3), [10] * 8)
    batches = [part for step in range(5) for part in plan.rows(step)]
    assert [len(batch) for batch in batches] == [3] * 5
    flat = [row for batch in batches for row in batch]
    assert sorted(flat[:8]) == list(range(8)) and len(set(flat[8:])) == 7


def test_the_rows_of_a_step_do_not_depend_on_earlier_calls():
    chosen = recipe("full", steps=9, batch_size=3, accumulation=2)
    in_order, backwards = StepPlan(chosen, [10] * 7), StepPlan(chosen, [10] * 7)
    expected = [in_order.rows(step) for step in range(9)]
    assert [backwards.rows(step) for step in reversed(range(9))] == expected[::-1]
    assert all(len(parts) == 2 for parts in expected)
    other = StepPlan(recipe("full", steps=9, batch_size=3, accumulation=2, seed=1), [10] * 7)
    assert [other.rows(step) for step in range(9)] != expected


@pytest.mark.parametrize("budget", [1, 30, 31, 500])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(budget):
    sizes = [7, 11, 13, 5, 9]
    plan = StepPlan(recipe("full", steps=None, tokens=budget, batch_size=2), sizes)
    seen = [sum(sizes[row] for part in plan.rows(step) for row in part) for step in range(plan.steps)]
    assert sum(seen) >= budget > sum(seen[:-1])
    assert [plan.tokens(step) for step in range(plan.steps)] == seen


def test_the_held_out_loss_is_computed_at_the_quarters_or_as_set():
    assert StepPlan(recipe("full", steps=8), [1]).evaluated == {0, 2, 4, 6, 8}
    assert StepPlan(recipe("full", steps=1), [1]).evaluated == {0, 1}
    assert StepPlan(recipe("full", steps=8, evaluate_at=(3, 5)), [1]).evaluated == {3, 5, 8}


def test_training_is_adamw_on_the_mean_over_predicted_tokens_clipped():
    """Compared with a loop over single rows and torch's own optimizer."""
    chosen = recipe(
        "full",
        keep="none",
        steps=6,
        batch_size=2,
        accumulation=2,
        weight_decay=0.1,
        clip=0.5,
        schedule="cosine",
    )
    ours, reference = exact(), exact()
    reference.requires_grad_(True).train()
    plan = StepPlan(chosen, [len(row[0].input_ids) for row in uneven()])
    matrices = [parameter for parameter in reference.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in reference.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    )
    expected = []
    for step in range(6):
        total = predicted = 0
        for row in [row for part in plan.rows(step) for row in part]:
            (item,) = uneven()[row]
            logits = reference(input_ids=item.input_ids[None].to(reference.device)).logits[0]
            for at in range(1, len(item.input_ids)):
                if item.labels[at] >= 0:
                    total = total - logits[at - 1].log_softmax(0)[item.labels[at]]
                    predicted += 1
        optimizer.zero_grad()
        (total / predicted).backward()
        expected.append(float(total.detach() / predicted))
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(step, 6)
        optimizer.step()
    recovered, points = tune(chosen, ours, Examples(uneven(), rows()[:1]))
    assert [point.train_loss for point in points[1:]] == pytest.approx(expected, rel=1e-4)
    assert [point.step for point in points] == list(range(7))
    assert points[-1].tokens == sum(plan.tokens(step) for step in range(6))
    for name, parameter in recovered.model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_no_byte(method):
    models = [
        tune(recipe(method, steps=3, gradient_checkpointing=whether), families.model("gpt2"))[0].model
        for whether in (False, True)
    ]
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name


class Watched(Arm):
    """An arm that trains nothing and records the norm of its gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.norms = model.requires_grad_(True), []

    def trained(self):
        return dict(self.model.named_parameters())

    def step(self, learning_rate):
        squares = [parameter.grad.pow(2).sum() for parameter in self.model.parameters()]
        self.norms.append(float(sum(squares).sqrt()))

    def state(self):
        return {}

    def load(self, state):
        pass

    def finish(self):
        return Recovered(self.model)


def test_a_gradient_longer_than_clip_is_scaled_down_and_a_shorter_one_kept():
    norms = {}
    for clip in (1e-3, 1e6):
        arm = Watched(exact())
        run(recipe("full", clip=clip), arm)
        norms[clip] = arm.norms
    assert norms[1e-3] == pytest.approx([1e-3] * 8, rel=1e-3)
    assert min(norms[1e6]) > 1e-2


def test_the_held_out_loss_is_the_mean_over_tokens_and_keeps_the_models_mode():
    model = exact("gpt2").train()
    model.transformer.drop.p = 0.5  # off while the loss is computed
    losses = []
    for (item,) in uneven():
        with torch.no_grad():
            ids = item.input_ids[None].to(model.device)
            logits = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-float(logits[at - 1, label]) for at, label in enumerate(item.labels) if label >= 0]
    model.train()
    assert held_out_loss(model, uneven(), 3) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert model.training


def test_a_loss_that_is_nan_or_infinite_is_refused():
    model = families.model("llama")
    model.model.norm.weight.data[0] = float("inf")
    with pytest.raises(
        Refusal, match=r"the held-out loss of base/tiny is (nan|inf) before any training; use another source"
    ):
        tune(recipe("lora"), model)


def test_a_gradient_that_is_nan_is_refused_and_leaves_no_checkpoint(monkeypatch):
    batch_loss, losses = objective.batch_loss, []

    def loss(model, batch, distillation):
        mean, count = batch_loss(model, batch, distillation)
        if model.training:
            losses.append(mean)
        # The loss is finite, but the slope of the square root at 0 is not.
        return (mean if len(losses) < 4 else mean + (mean - mean.detach()).sqrt()), count

    monkeypatch.setattr(objective, "batch_loss", loss)
    with pytest.raises(
        Refusal, match=r"the training gradient became (nan|inf) at step 4; .* or clip .now 1.0.*warmup"
    ):
        tune(recipe("full", checkpoint_every=2), families.model("llama"))
    assert not Path("scratch").exists()


def on_cuda(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def in_python(*_):
    raise MemoryError


def on_a_cpu(*_, **__):
    return torch.empty(2**46)


@pytest.mark.parametrize("loss", [on_cuda, in_python, on_a_cpu])
def test_too_little_memory_is_refused_with_the_settings_to_change(loss, monkeypatch):
    monkeypatch.setattr(objective, "batch_loss", loss)
    with (
        pytest.raises(
            Refusal,
            match=r"not enough memory; lower batch_size \(now 4; raise accumulation, now 1, .* "
            r"or lower train.sequence_length \(now 32\) or set gradient_checkpointing: true\.",
        ),
        refusing_out_of_memory(recipe("full")),
    ):
        tune(recipe("full"), families.model("llama"))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ValueError])
def test_other_errors_are_raised_unchanged(error, monkeypatch):
    def loss(*_):
        raise error("shapes")

    monkeypatch.setattr(objective, "batch_loss", loss)
    with pytest.raises(error, match="shapes"), refusing_out_of_memory(recipe("full")):
        tune(recipe("full"), families.model("llama"))


def test_evaluate_at_beyond_the_budget_is_refused():
    chosen = recipe("full", steps=None, tokens=500, evaluate_at=(0, 9))
    with pytest.raises(Refusal, match="evaluate_at names step 9, but 500 tokens are reached after 6 steps"):
        tune(chosen, families.model("llama"))

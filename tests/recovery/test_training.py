"""The loop: rows, rates, accumulation and refusals; and that a killed run ends as one never killed does."""

import csv
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.corpus.examples import Examples
from stages.corpus.rows import example
from stages.recovery import objective, training
from stages.recovery import saves as checkpoints
from stages.recovery.adam import Adam
from stages.recovery.arm import Arm, Finished
from stages.recovery.saves import Checkpoints
from stages.recovery.training import Plan, held_out_loss, train
from tests import families
from tests.pipeline import NONE, altered, do, finetune, params
from tests.tuned import LORA, TEXT, recipe, rows, tune


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def exact(family: str = "llama") -> torch.nn.Module:
    """A model in fp32, in which sums in another order differ by next to nothing, and without dropout."""
    model = families.model(family).float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def uneven() -> list:
    """Eight rows of unlike lengths, of which unlike parts are predicted."""
    return [
        (example(torch.arange(8 + 2 * number).remainder(7), start=1 + number % 4),) for number in range(8)
    ]


# Which rows, and at what rate.


def test_every_row_is_seen_before_any_comes_again():
    plan = Plan(recipe("full", steps=5, batch_size=3), [10] * 8)
    batches = [part for step in range(5) for part in plan.rows(step)]
    assert [len(batch) for batch in batches] == [3] * 5
    flat = [row for batch in batches for row in batch]
    assert sorted(flat[:8]) == list(range(8)) and len(set(flat[8:])) == 7


def test_a_step_has_its_rows_whatever_was_asked_before():
    chosen = recipe("full", steps=9, batch_size=3, accumulation=2)
    in_order, backwards = Plan(chosen, [10] * 7), Plan(chosen, [10] * 7)
    expected = [in_order.rows(step) for step in range(9)]
    assert [backwards.rows(step) for step in reversed(range(9))] == expected[::-1]
    assert all(len(parts) == 2 for parts in expected)
    other = Plan(recipe("full", steps=9, batch_size=3, accumulation=2, seed=1), [10] * 7)
    assert [other.rows(step) for step in range(9)] != expected


@pytest.mark.parametrize("budget", [1, 30, 31, 500])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(budget):
    sizes = [7, 11, 13, 5, 9]
    plan = Plan(recipe("full", steps=None, tokens=budget, batch_size=2), sizes)
    seen = [sum(sizes[row] for part in plan.rows(step) for row in part) for step in range(plan.steps)]
    assert sum(seen) >= budget > sum(seen[:-1])
    assert [plan.tokens(step) for step in range(plan.steps)] == seen


def test_the_loss_is_held_out_at_the_quarters_or_where_it_is_said():
    assert Plan(recipe("full", steps=8), [1]).evaluated == {0, 2, 4, 6, 8}
    assert Plan(recipe("full", steps=1), [1]).evaluated == {0, 1}
    assert Plan(recipe("full", steps=8, evaluate_at=(3, 5)), [1]).evaluated == {3, 5, 8}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (7, 0.0), (48, 0.1), (40, 1.0), (30, 0.5)])
def test_a_rate_rises_in_the_warmup_and_falls_as_the_schedule_says(schedule, steps, warmup):
    chosen = recipe("full", steps=steps, warmup=warmup, schedule=schedule, learning_rate=3.0)
    rates = [chosen.rate(step, steps) for step in range(steps)]
    rising = max(1, int(steps * warmup))
    for step, rate in enumerate(rates):
        gone = (step - rising + 1) / (steps - rising + 1)
        falling = {"linear": 1 - gone, "cosine": 0.5 + 0.5 * math.cos(math.pi * gone), "constant": 1.0}
        assert rate == pytest.approx(3.0 * (min(1, (step + 1) / rising) if gone <= 0 else falling[schedule]))
    assert max(rates) == rates[rising - 1] == 3.0 and min(rates) > 0


# What a step does.


def test_training_is_adamw_on_the_mean_over_predicted_tokens_clipped():
    """Against a loop that takes one row at a time and torch's optimizer as it is."""
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
    plan = Plan(chosen, [len(row[0].input_ids) for row in uneven()])
    matrices = [one for one in reference.parameters() if one.ndim > 1]
    others = [one for one in reference.parameters() if one.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    )
    expected = []
    for step in range(6):
        total = predicted = 0
        for row in [row for part in plan.rows(step) for row in part]:
            (one,) = uneven()[row]
            logits = reference(input_ids=one.input_ids[None]).logits[0]
            for at in range(1, len(one.input_ids)):
                if one.labels[at] >= 0:
                    total = total - logits[at - 1].log_softmax(0)[one.labels[at]]
                    predicted += 1
        optimizer.zero_grad()
        (total / predicted).backward()
        expected.append(float(total.detach() / predicted))
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(step, 6)
        optimizer.step()
    finished, points = tune(chosen, ours, Examples(uneven(), rows()[:1]))
    assert [point.train_loss for point in points[1:]] == pytest.approx(expected, rel=1e-4)
    assert [point.step for point in points] == list(range(7))
    assert points[-1].tokens == sum(plan.tokens(step) for step in range(6))
    for name, parameter in finished.model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_no_byte():
    made = [
        tune(recipe("full", steps=3, gradient_checkpointing=whether), families.model("gpt2"))[0].model
        for whether in (False, True)
    ]
    for name, parameter in made[0].named_parameters():
        assert torch.equal(parameter, made[1].get_parameter(name)), name


class Watched(Arm):
    """Trains nothing; notes the gradient it is given."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.norms = model.requires_grad_(True), []

    def trained(self):
        return dict(self.model.named_parameters())

    def step(self, learning_rate):
        self.norms.append(float(sum(one.grad.pow(2).sum() for one in self.model.parameters()).sqrt()))

    def state(self):
        return {}

    def load(self, state):
        pass

    def finish(self):
        return Finished(self.model)


def test_a_gradient_longer_than_clip_is_made_as_long_and_a_shorter_one_left():
    norms = {}
    for clip in (1e-3, 1e6):
        arm = Watched(exact())
        train("test", recipe("full", clip=clip), arm, Examples(rows(), rows()), Checkpoints(Path("x/y"), 50))
        norms[clip] = arm.norms
    assert norms[1e-3] == pytest.approx([1e-3] * 8, rel=1e-3)
    assert min(norms[1e6]) > 1e-2


def test_a_small_step_is_not_lost_in_a_narrow_weight():
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    adam = Adam({"w": weight}, weight_decay=0.0)
    for _ in range(10):
        weight.grad = torch.ones(2, 2)
        adam.step(1e-3)  # below half of bf16's step at 1, 2^-9
    assert (weight.float() - 0.99).abs().max() < 2**-8
    assert adam.state()["w.master"].sub(0.99).abs().max() < 1e-5


def test_held_out_loss_is_the_mean_over_tokens_and_leaves_the_model_as_it_was():
    model = exact("gpt2").train()
    model.transformer.drop.p = 0.5  # is off while the loss is taken
    losses = []
    for (one,) in uneven():
        with torch.no_grad():
            logits = model.eval()(input_ids=one.input_ids[None]).logits[0].log_softmax(-1)
        losses += [-float(logits[at - 1, label]) for at, label in enumerate(one.labels) if label >= 0]
    model.train()
    assert held_out_loss(model, uneven(), 3) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert model.training


# What is refused.


def test_a_loss_that_is_no_number_is_refused():
    model = families.model("llama")
    model.model.norm.weight.data[0] = float("inf")
    with pytest.raises(
        Refusal, match=r"the held-out loss became (nan|inf) at step 0; lower learning_rate \(now 0.01\)"
    ):
        tune(recipe("lora"), model)


def test_a_gradient_that_is_no_number_is_refused_and_leaves_no_checkpoint(monkeypatch):
    whole = objective.loss
    taken = []

    def loss(model, batch, distillation):
        mean, count = whole(model, batch, distillation)
        if model.training:
            taken.append(mean)
        # Finite itself, but the square root's slope at 0 is not.
        return (mean if len(taken) < 4 else mean + (mean - mean.detach()).sqrt()), count

    monkeypatch.setattr(objective, "loss", loss)
    with pytest.raises(
        Refusal, match=r"the training gradient became (nan|inf) at step 3; .* or clip .now 1.0.*warmup"
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
def test_too_little_memory_is_told_with_what_to_change(loss, monkeypatch):
    monkeypatch.setattr(objective, "loss", loss)
    with pytest.raises(
        Refusal,
        match=r"not enough memory; lower batch_size \(now 4; a higher accumulation, now 1, .* "
        r"train.sequence_length \(now 32\), or set gradient_checkpointing: true\.",
    ):
        tune(recipe("full"), families.model("llama"))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ValueError])
def test_another_error_stays_what_it_is(error, monkeypatch):
    def loss(*_):
        raise error("shapes")

    monkeypatch.setattr(objective, "loss", loss)
    with pytest.raises(error, match="shapes"):
        tune(recipe("full"), families.model("llama"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tokens": 500}, "both steps and tokens are given; give one of the two"),
        ({"steps": None}, "neither steps nor tokens is given; give one of the two"),
        ({"evaluate_at": (0, 9)}, "evaluate_at names step 9, and there are 8; lower it"),
    ],
)
def test_a_budget_is_said_once_and_covers_what_is_evaluated(settings, told):
    with pytest.raises(ValidationError, match=told):
        recipe("full", **settings)


def test_evaluate_at_beyond_the_budget_is_refused():
    chosen = recipe("full", steps=None, tokens=500, evaluate_at=(0, 9))
    with pytest.raises(Refusal, match="evaluate_at names step 9, and 500 tokens are reached after 6"):
        tune(chosen, families.model("llama"))


# Nothing is lost.

SOURCE = {
    "lora": "prune/half", "full": "prune/half", "qat": "quantize/four", "eco": "quantize/four",
}  # fmt: skip
MADE = {
    "prune/half": {
        "source": "base/tiny", "method": "magnitude", "sparsity": 0.5, "scope": "matrix", "calibration": NONE,
    },
    "quantize/four": {
        "source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE,
    },
}  # fmt: skip
TRAINED = {"train": TEXT, "learning_rate": 0.01, "steps": 5, "batch_size": 2, "checkpoint_every": 2}


class Killed(BaseException):
    """What a test kills with."""


def stage(method: str, **options):
    settings = {"source": SOURCE[method], "method": method, **TRAINED, **(LORA if method == "lora" else {})}
    return params("gpt2" if method == "full" else "llama", MADE | {"finetune/it": settings | options})


def output() -> dict[str, bytes]:
    files = [*Path("data/models/finetune/it").iterdir(), Path("data/curves/it.csv")]
    return {file.name: file.read_bytes() for file in files}


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = training._step

    def killed(recipe, arm, parts, at, rate):
        if at == step:
            raise Killed
        return whole(recipe, arm, parts, at, rate)

    monkeypatch.setattr(training, "_step", killed)


def finish(chosen) -> list[int]:
    """Run the stage to its end; the steps that were done."""
    done = []
    whole = training._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", lambda *given: done.append(given[3]) or whole(*given))
        finetune(chosen, "it")
    return done


@pytest.mark.parametrize("method", list(SOURCE))
def test_killed_at_any_step_the_next_run_ends_with_the_same_bytes(method, workspace):
    """GPT-2 in training draws dropout, and llama is trained on its quantized weights."""
    chosen = stage(method)
    do(chosen, [SOURCE[method]])
    assert finish(chosen) == list(range(5))
    expected = output()
    assert {"model.safetensors", "artifact.json", "it.csv"} <= set(expected)
    for step in range(5):
        shutil.rmtree("data/models/finetune")
        shutil.rmtree("data/curves")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(step, patch)
            finetune(chosen, "it")
        assert finish(chosen) == list(range(step // 2 * 2, 5))
        assert output() == expected
        assert not list(Path("data/scratch/finetune").rglob("*.*"))


def test_killed_while_it_writes_a_checkpoint_it_goes_on_from_the_one_before(workspace, monkeypatch):
    chosen = stage("full")
    do(chosen, ["prune/half"])
    finish(chosen)
    expected = output()
    for part in ("save_file", "write_json"):
        whole, calls = getattr(checkpoints, part), []

        def killed(*given, whole=whole, calls=calls):
            calls.append(given)
            if len(calls) == 2:
                raise Killed
            whole(*given)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(checkpoints, part, killed)
            finetune(chosen, "it")
        assert finish(chosen) == [2, 3, 4]
        assert output() == expected


@pytest.mark.parametrize("change", ["recipe", "source", "text"])
def test_a_checkpoint_of_other_inputs_is_not_gone_on_from(change, workspace):
    chosen = stage("full")
    do(chosen, ["prune/half"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(3, patch)
        finetune(chosen, "it")
    (left,) = Path("data/scratch/finetune/it").iterdir()
    if change == "recipe":
        chosen = stage("full", learning_rate=0.02)
    else:
        file = {
            "source": "data/models/prune/half/model.safetensors",
            "text": "data/datasets/news/evaluation.parquet",
        }
        altered(Path(file[change]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(4, patch)
        finetune(chosen, "it")
    assert not left.exists()
    (kept,) = Path("data/scratch/finetune/it").iterdir()
    assert sorted(file.name for file in kept.iterdir()) == ["step-000004.json", "step-000004.safetensors"]


def test_the_curve_has_a_row_a_step_and_the_artifact_says_how_far_it_went(workspace):
    chosen = stage("lora", evaluate_at=[0, 5])
    do(chosen, ["prune/half", "finetune/it"])
    with Path("data/curves/it.csv").open() as file:
        told = list(csv.DictReader(file))
    assert list(told[0]) == ["step", "tokens", "learning_rate", "train_loss", "heldout_loss"]
    assert [int(row["step"]) for row in told] == list(range(6))
    assert [int(row["tokens"]) for row in told] == [64 * step for step in range(6)]
    assert [bool(row["heldout_loss"]) for row in told] == [True, *[False] * 4, True]
    assert [bool(row["train_loss"]) for row in told] == [False, *[True] * 5]
    assert float(told[-1]["heldout_loss"]) < float(told[0]["heldout_loss"])


def test_a_checkpoint_goes_on_where_the_same_inputs_were_written_again_or_memory_was_short(
    workspace, monkeypatch
):
    chosen = stage("full")
    do(chosen, ["prune/half"])
    finish(chosen)
    expected = output()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(3, patch)
        finetune(chosen, "it")
    Path("data/models/prune/half/model.safetensors").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "loss", in_python)
        with pytest.raises(Refusal, match="not enough memory"):
            finetune(chosen, "it")
    assert finish(chosen) == [2, 3, 4]
    assert output() == expected


def test_a_checkpoint_that_cannot_be_read_is_none(workspace, caplog):
    logging.disable(logging.NOTSET)
    chosen = stage("full")
    do(chosen, ["prune/half"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(3, patch)
        finetune(chosen, "it")
    (kept,) = Path("data/scratch/finetune/it").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:5])
    assert finish(chosen) == list(range(5))
    assert "cannot be read" in caplog.text and "training begins again" in caplog.text


@pytest.mark.parametrize("method", ["full", "lora", "qat", "eco"])
def test_damage_done_by_the_last_step_is_told(method, workspace, monkeypatch):
    chosen = stage(method, steps=2, evaluate_at=[0])
    do(chosen, [SOURCE[method]])
    whole = training._step

    def broken(recipe, arm, parts, at, rate):
        return whole(recipe, arm, parts, at, torch.inf if at == 1 else rate)

    monkeypatch.setattr(training, "_step", broken)
    told = "held-out loss became nan at step 2" if method in ("full", "lora") else "became NaN or infinite"
    with pytest.raises(Refusal, match=rf"{told}.*; lower learning_rate"):
        finetune(chosen, "it")
    assert not Path("data/models/finetune").exists()


@pytest.mark.parametrize(
    "where", ["transformers.AutoModelForCausalLM.from_pretrained", "stages.model.checkpoint.save"]
)
def test_too_little_memory_outside_the_loop_is_told_too(where, workspace, monkeypatch):
    chosen = stage("full")
    do(chosen, ["prune/half"])
    monkeypatch.setattr(where, on_a_cpu)
    with pytest.raises(Refusal, match=r"not enough memory; lower batch_size \(now 2"):
        finetune(chosen, "it")
    assert not Path("data/models/finetune").exists()

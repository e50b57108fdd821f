"""A quantized source's own grid: read back, rounded to again, trained on, and written packed."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stages.core.errors import Refusal
from stages.corpus import examples
from stages.corpus.examples import Train
from stages.model import artifact
from stages.model.blocks import linears
from stages.model.floats import Float8, MXFloat4, NVFloat4
from stages.model.grid import Codes, Int8, Integers, Quantized, bounds
from stages.recovery.eco import BETAS, ECO, returned
from stages.recovery.grids import put_on
from stages.recovery.qat import QAT
from stages.recovery.training import held_out_loss
from tests import families
from tests.pipeline import NONE, STAGES, TEXT, dense, do, load, params, record

SEED = st.integers(0, 2**31)


def drawn(seed: int, rows: int = 6, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def grids(weight: torch.Tensor) -> dict[str, Quantized]:
    """`weight` in every format a file holds."""
    whole = Integers(8, None).nearest(weight)
    return {
        **{
            f"{bits} bits {symmetric}": Integers(bits, 16, symmetric).nearest(weight)
            for bits in (2, 3, 4, 6)
            for symmetric in (True, False)
        },
        "int8": Int8(whole.codes, whole.scale),
        "fp8": Float8.nearest(weight, by_row=True, dynamic=False),
        "mxfp4": MXFloat4.nearest(weight),
        "nvfp4": NVFloat4.nearest(weight),
    }


@settings(deadline=None, max_examples=20)
@given(SEED, st.sampled_from([torch.bfloat16, torch.float32]))
def test_what_lies_on_a_grid_is_found_again_and_zero_stays_zero(seed, dtype):
    for name, code in grids(drawn(seed).to(dtype)).items():
        values = code.dequantize()
        again = code.requantize(values)
        assert type(again) is type(code) and torch.equal(again.dequantize(), values), name
        assert all(
            torch.equal(tensor.float(), getattr(code, field).float())
            for field, tensor in vars(again).items()
            if isinstance(tensor, torch.Tensor)
        ), name
        assert not code.requantize(torch.zeros_like(values)).dequantize().any(), name


@settings(deadline=None, max_examples=20)
@given(SEED)
def test_a_weight_goes_to_the_nearest_point_of_a_grid_made_for_another(seed):
    """Against every point there is, a value at a time."""
    weight = drawn(seed + 1, 2, 32) * 1.5
    for name, code in grids(drawn(seed, 2, 32)).items():
        if name == "fp8":
            continue  # 256 points are the dtype's own
        if isinstance(code, Codes):
            low, high = bounds(code.bits)
            levels = [float(point) for point in range(low, high + 1)]
        else:
            levels = [sign * level for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (1, -1)]
        every = [replace(code, codes=torch.full_like(code.codes, level)) for level in levels]
        points = torch.stack([one.dequantize().float() for one in every])
        nearest = (points - weight).abs().amin(0)
        found = code.requantize(weight).dequantize().float()
        slack = 2**-7 * found.abs().max()  # values are rounded to the dtype they are stored in
        assert ((found - weight).abs() <= nearest + slack).all(), name


@given(SEED, st.sampled_from([2, 3, 4]), st.booleans())
def test_inside_is_where_clamping_changes_nothing(seed, bits, symmetric):
    code = Integers(bits, 16, symmetric).nearest(drawn(seed))
    weight = drawn(seed + 1) * 2
    low, high = bounds(bits)
    zero = torch.zeros_like(code.scale) if code.zero_point is None else code.zero_point.float()
    wide = [value.repeat_interleave(16, 1) for value in (code.scale, zero)]
    free = (weight / wide[0]).round() + wide[1]
    assert torch.equal(code.inside(weight), (free >= low) & (free <= high))
    assert 0 < code.inside(weight).float().mean() < 1


def tuning(kind: type, **options):
    settings = {"steps": 8, "batch_size": 1, "learning_rate": 0.01, "method": kind.__name__.lower()} | options
    return kind.model_validate({"source": "quantize/m", "train": {"dataset": "news"}, **settings})


def quantized(bits: int = 3) -> tuple[torch.nn.Module, dict[str, Quantized]]:
    """A tiny model on a grid that leans to no side, and that grid."""
    model = families.model("llama").float()
    grid = {one.name: Integers(bits, 16, symmetric=False).nearest(one.weight) for one in linears(model)}
    return model, put_on(grid, model)


def windows() -> torch.Tensor:
    """Text with something to learn: one short sequence over and over."""
    return torch.arange(24).remainder(6).repeat(8, 1) + torch.arange(8).remainder(2)[:, None]


def train(arm, rate: float, steps: int) -> list[float]:
    """The losses of `steps` steps at a constant rate."""
    losses = []
    for _ in range(steps):
        loss = arm.model(input_ids=windows(), labels=windows()).loss
        loss.backward()
        arm.step(rate)
        arm.model.zero_grad()
        losses.append(loss.item())
    return losses


def values(arm) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in arm.trained().items()}


ARMS = [
    tuning(QAT), tuning(QAT, keep="none"), tuning(ECO), tuning(ECO, keep="none"),
    tuning(ECO, optimizer="sgd", learning_rate=1.0),
]  # fmt: skip


@pytest.mark.parametrize("recipe", ARMS, ids=lambda r: f"{r.method}-{r.keep}-{getattr(r, 'optimizer', '')}")
def test_weights_are_on_the_grid_after_every_step_and_learn(recipe):
    model, grid = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arm = recipe.arm(model, grid)
    zeros = {name: weight == 0 for name, weight in arm.trained().items()}
    losses, moved = [], False
    for _ in range(30):
        losses += train(arm, recipe.learning_rate, 1)
        for name, weight in values(arm).items():
            assert torch.equal(grid[name].requantize(weight).dequantize(), weight)
            assert recipe.keep == "none" or not weight[zeros[name]].any()
            moved |= recipe.keep == "none" and bool(weight[zeros[name]].any())
    assert losses[-1] < losses[0] - 0.05
    assert moved == (recipe.keep == "none")
    finished = arm.finish()
    assert finished.codes.keys() == grid.keys()
    for name, code in finished.codes.items():
        assert torch.equal(code.dequantize(), finished.model.get_parameter(f"{name}.weight"))
        assert torch.equal(code.scale, grid[name].scale)
        assert torch.equal(code.zero_point, grid[name].zero_point)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed and {name.removesuffix(".weight") for name in changed} <= grid.keys()


@pytest.mark.parametrize("recipe", ARMS, ids=lambda r: f"{r.method}-{r.keep}-{getattr(r, 'optimizer', '')}")
def test_a_state_goes_on_bit_for_bit(recipe):
    arms = [recipe.arm(*quantized()) for _ in range(2)]
    train(arms[0], recipe.learning_rate, 6)
    state = {name: tensor.clone() for name, tensor in arms[0].state().items()}
    arms[1].load(state)
    for arm in arms:
        train(arm, recipe.learning_rate, 6)
    ends = [arm.state() for arm in arms]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert all(torch.equal(one, values(arms[1])[name]) for name, one in values(arms[0]).items())


@pytest.mark.parametrize("kind", [QAT, ECO])
def test_what_ignore_names_is_left_alone_and_written_as_it_was(kind):
    model, grid = quantized()
    before = {name: code.dequantize() for name, code in grid.items()}
    arm = tuning(kind, ignore=("mlp.up_proj",)).arm(model, grid)
    train(arm, 0.05, 5)
    assert not any("up_proj" in name for name in arm.trained())
    for name, code in arm.finish().codes.items():
        assert torch.equal(code.dequantize(), before[name]) == ("up_proj" in name)


def test_a_master_beyond_the_codes_gets_no_gradient():
    model, grid = quantized(bits=2)
    arm = tuning(QAT, keep="none").arm(model, grid)
    name, weight = next(iter(arm.trained().items()))
    master = arm.state()[f"{name}.master"]
    (weight * -1.0).sum().backward()
    assert (weight.grad == -1).all()
    arm.step(1.0)  # far beyond the largest code
    weight.grad = None
    outside = ~grid[name].inside(master)
    assert outside.any()
    (weight * -1.0).sum().backward()
    assert torch.equal(weight.grad == 0, outside)


def gradients(weight: torch.Tensor, steps: int, draw: torch.Generator) -> list[torch.Tensor]:
    """Of one size, so that Adam's second moment is the same at each step, and drawn signs."""
    return [torch.randn(weight.shape, generator=draw).sign() * 0.5 for _ in range(steps)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_rounding_error_comes_back(optimizer):
    """Where the weights come to rest once gradients end is where they would without a grid.

    The reference is the optimizer's own recursion in fp64 on weights that nobody rounds, each gradient's
    contributions to all later steps summed one by one. The schedule changes at every step.
    """
    model, grid = quantized(bits=8)
    arm = tuning(ECO, optimizer=optimizer, keep="none").arm(model, grid)
    name, weight = next(iter(arm.trained().items()))
    start, beta, steps = weight.detach().double(), BETAS[0], 12
    rates = [2e-5 * (1 + t % 5) for t in range(steps)]
    rest = start.clone()
    for t, gradient in enumerate(gradients(weight, steps, torch.Generator().manual_seed(0)), start=1):
        weight.grad = gradient
        arm.step(rates[t - 1])
        divided = gradient.double() / 0.5 if optimizer == "adam" else gradient.double()
        for later in range(400):
            bias = 1 - beta ** (t + later) if optimizer == "adam" else 1.0
            rest -= rates[t - 1] * (1 - beta) * beta**later * divided / bias
    moment = arm.state()[f"{name}.first"].double()
    ahead = moment / 0.5 * returned(beta, steps) if optimizer == "adam" else moment * beta / (1 - beta)
    inside = grid[name].inside(rest)
    torch.testing.assert_close((weight.detach() - ahead)[inside], rest[inside], rtol=0, atol=1e-6)
    plain = tuning(ECO, optimizer=optimizer, keep="none", feedback=False).arm(*quantized(bits=8))
    weight = next(iter(plain.trained().values()))
    for rate, gradient in zip(rates, gradients(weight, steps, torch.Generator().manual_seed(0)), strict=True):
        weight.grad = gradient
        plain.step(rate)
    assert (weight.detach() - rest).abs().max() > 1e-5


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_what_a_unit_of_momentum_adds_up_to(step):
    moment, total = 1.0, 0.0
    for k in range(1, 500):
        moment *= 0.9
        total += moment / (1 - 0.9 ** (step + k))
    assert returned(0.9, step) == pytest.approx(total)
    if step == 1000:
        assert total == pytest.approx(9)  # beta / (1 - beta), the paper's


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 1e-3), ("sgd", 0.02)])
def test_feedback_learns_where_plain_rounding_loses_its_steps(optimizer, rate):
    last = {}
    for feedback in (True, False):
        arm = tuning(ECO, optimizer=optimizer, feedback=feedback, keep="none").arm(*quantized())
        last[feedback] = train(arm, rate, 60)[-1]
    arm = tuning(ECO, optimizer=optimizer, keep="none").arm(*quantized())
    first = train(arm, rate, 1)[0]
    assert first - last[True] > 5 * (first - last[False])
    assert last[True] < first - 0.1


NEWS = {"dataset": "news", "num_samples": 4, "sequence_length": 32, "held_out": 2}
BLOCK = TEXT | {"sequential": "block"}
SHORT = {"train": NEWS, "steps": 3, "batch_size": 2, "learning_rate": 0.02}
LORA = {"method": "lora", "rank": 2, "alpha": 4, **SHORT}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "group_size": 16, "symmetric": False, "calibration": NONE},
    "awq": {"bits": 4, "group_size": 32, "calibration": BLOCK},
    "smoothquant": {"calibration": BLOCK},
    "fp8": {"calibration": NONE},
    "mxfp4": {"calibration": NONE},
    "nvfp4": {"calibration": NONE},
}
INTEGERS = ["rtn", "awq", "smoothquant"]


def made(quantizer: str, tuning: dict[str, Any], family: str = "llama") -> None:
    """Quantize the tiny model into quantize/source and tune that into finetune/result."""
    recipes = {
        "quantize/source": {"source": "base/tiny", "method": quantizer, **QUANTIZERS[quantizer]},
        "finetune/result": {"source": "quantize/source", **tuning},
    }
    do(params(family, recipes), list(recipes))


def stored(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path("data/models") / name / "model.safetensors")


@pytest.mark.parametrize(
    ("quantizer", "tuning"),
    [(quantizer, LORA | {"keep": "none", "requantize": True}) for quantizer in QUANTIZERS]
    + [("rtn", {"method": "full", "keep": "mask", "requantize": True, **SHORT})]
    + [(quantizer, {"method": method, **SHORT}) for quantizer in INTEGERS for method in ("qat", "eco")],
    ids=lambda told: told if isinstance(told, str) else told["method"],
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_result_is_packed_on_the_grid_of_its_source(family, quantizer, tuning, workspace):
    made(quantizer, tuning, family)
    source, result = record("quantize/source"), record("finetune/result")
    assert result["layout"] == source["layout"] and source["layout"] not in ("dense", "fake_quantized")
    assert result["bits_per_weight"] == pytest.approx(source["bits_per_weight"], rel=0.01)
    before, after = stored("quantize/source"), stored("finetune/result")
    assert before.keys() == after.keys()
    fixed = ("_scale", "_zero_point", "_global_scale", "_shape")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith(fixed))
    codes = [name for name in before if name.removesuffix("_packed") + "_scale" in before]
    changed = [name for name in codes if not torch.equal(before[name].float(), after[name].float())]
    assert codes and changed
    weights = [dense(load(name)) for name in ("quantize/source", "finetune/result")]
    for one in linears(weights[0], partial=True):
        first, last = (model.get_submodule(one.name).weight for model in weights)
        assert last.isfinite().all()
        if tuning.get("keep", "mask") == "mask":
            assert not last[first == 0].any()


def test_the_loss_it_is_recorded_with_is_that_of_the_file(workspace):
    tuning = LORA | {"keep": "none", "requantize": True}
    made("rtn", tuning)
    model = dense(load("finetune/result"))
    chosen = Train.model_validate(tuning["train"])
    rows = examples.load_examples(chosen, artifact.load_tokenizer("finetune/result"), model.config).held_out
    expected = held_out_loss(model, rows, 2)
    told = record("finetune/result")["notes"]["finetune/result"]["held_out_loss"]
    assert told == pytest.approx(expected, rel=1e-3)  # the stage computes in bf16
    with Path("data/curves/result.csv").open() as file:
        trained = float(list(csv.DictReader(file))[-1]["heldout_loss"])
    assert abs(trained - told) > 10 * abs(expected - told)  # before the rounding it was another


def test_a_dense_result_of_a_quantized_source_says_so(workspace):
    made("rtn", LORA | {"keep": "none", "requantize": False})
    assert record("finetune/result")["layout"] == "dense"
    assert not any(name.endswith("_scale") for name in stored("finetune/result"))


@pytest.mark.parametrize(
    ("source", "tuning", "told"),
    [
        ("rtn", LORA, "quantize/source is quantized; add requantize: true"),
        (None, LORA | {"requantize": True}, "base/tiny is dense and has no grid; leave it out"),
        (None, {"method": "qat", **SHORT}, "qat trains on its source's grid and base/tiny is dense"),
        ("mxfp4", {"method": "eco", **SHORT}, "eco serves grids of integers, and .* is mxfp4-pack-quantized"),
        ("nf4", {"method": "qat", **SHORT}, "fake_quantized: no format holds its codes"),
        ("nf4", LORA | {"requantize": True}, "requantize cannot be true: quantize/source is fake_quantized"),
    ],
)
def test_what_does_not_fit_the_source_is_refused_before_a_weight_is_read(
    source, tuning, told, workspace, monkeypatch
):
    recipes = {"finetune/result": {"source": "quantize/source" if source else "base/tiny", **tuning}}
    if source:
        options = {"nf4": {"group_size": 32, "calibration": NONE}, **QUANTIZERS}[source]
        recipes = {"quantize/source": {"source": "base/tiny", "method": source, **options}, **recipes}
    chosen = params("llama", recipes)
    do(chosen, list(recipes)[:-1])
    monkeypatch.setattr(artifact, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(Refusal, match=told):
        STAGES["finetune"](chosen, "result")
    assert not Path("data/models/finetune").exists()

"""Importance of neurons and heads: measured inputs, bounds, and the choice of the highest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.shape import anatomy
from stages.pruning.shape.shrinker import change_bound, measure_inputs, most_important
from tests import families
from tests.families import DEVICE
from tests.pipeline import TEXT
from tests.shapes import WINDOWS, full, grouped, logits, width

pytestmark = pytest.mark.numerics


def test_measured_inputs_are_those_of_the_dense_model():
    model = full("llama")
    inputs = []
    part = anatomy.mlps(model)["model.layers.1"]
    part.writer.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(model)
    expected = inputs[0].reshape(-1, 64).double().square().mean(0).sqrt().float()
    for batch_size in (None, 1, 2):
        fresh = full("llama")
        rms = measure_inputs(fresh, anatomy.mlps(fresh), WINDOWS, batch_size, "w")["model.layers.1"]
        assert torch.allclose(rms, expected, rtol=1e-4)
    recipe = width(importance="activation", remove=0.5, calibration=TEXT)
    assert torch.equal(recipe.scores(part, rms, "model.layers.1"), rms)


def test_inputs_that_overflow_sums_matter_only_if_a_writer_reads_them():
    model = grouped("llama")
    model.model.layers[-1].post_attention_layernorm.weight.data[3] = 2e19
    rms = measure_inputs(model, anatomy.attentions(model), WINDOWS, None, "heads")
    assert rms.keys() == anatomy.attentions(model).keys()
    assert all(values.isfinite().all() and values.any() for values in rms.values())


def test_a_weight_that_is_not_finite_is_refused():
    model = families.model("llama")
    parts = anatomy.mlps(model)
    linears(model)[5].weight[0, 0] = float("nan")
    with pytest.raises(Refusal, match=r"NaN or infinite values in model\.layers\.0\.mlp\.up_proj\.weight"):
        measure_inputs(model, parts, WINDOWS, None, "width")


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 6))
def test_the_bound_of_a_feature_is_the_change_of_the_output_without_it(seed, features, out):
    draw = torch.Generator().manual_seed(seed)
    inside = torch.randn(20, features, generator=draw).to(DEVICE)
    writer = torch.randn(out, features, generator=draw).to(DEVICE)
    bound = change_bound(writer, inside.square().mean(0).sqrt())
    for i in range(features):
        without = inside.clone()
        without[:, i] = 0
        change = (inside @ writer.T - without @ writer.T).square().sum(1).mean().sqrt()
        assert float(bound[i]) == pytest.approx(float(change), rel=1e-3, abs=1e-5)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4))
def test_the_sum_of_bounds_bounds_the_change_of_the_output_without_all_features(seed, features, out):
    draw = torch.Generator().manual_seed(seed)
    inside, writer = (
        torch.randn(20, features, generator=draw).to(DEVICE),
        torch.randn(out, features, generator=draw).to(DEVICE),
    )
    change = (inside @ writer.T).square().sum(1).mean().sqrt()
    bound = change_bound(writer, inside.square().mean(0).sqrt()).sum()
    assert change <= bound * (1 + 1e-5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_the_highest_are_kept_in_order_and_ties_keep_the_higher_index(values, data):
    count = data.draw(st.integers(0, len(values)))
    kept = most_important(torch.tensor(values, dtype=torch.float32, device=DEVICE), count)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert kept.tolist() == sorted(order[len(values) - count :])
    assert kept.dtype == torch.int64

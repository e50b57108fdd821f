"""The frontier and its contenders, against their definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.reporting.statistics.pareto import contenders, frontier

points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=12)


@given(points)
def test_the_frontier_is_its_definition(models):
    sizes, losses, spread = (np.array(column, float) for column in zip(*models, strict=True))
    on = frontier(sizes, losses)
    for i, (size, loss, _) in enumerate(models):
        beaten = any(s <= size and x <= loss and (s, x) != (size, loss) for s, x, _ in models)
        assert on[i] == (not beaten)
    assert on.any()
    likely = contenders(sizes, losses - spread / 2, losses + spread / 2)
    assert (likely | ~on).all()  # the frontier is among those that may be on it
    for i, (size, loss, wide) in enumerate(models):
        assert likely[i] == (not any(s <= size and x + w / 2 < loss - wide / 2 for s, x, w in models))
    assert (contenders(sizes, losses, losses) >= on).all()


def test_a_model_of_unknown_size_or_loss_is_left_out():
    assert frontier([1, 2, 3, np.nan], [3, np.nan, 1, 0]).tolist() == [True, False, True, False]
    assert frontier([1, 2, 3], [np.inf, 2, -np.inf]).tolist() == [False, True, False]
    unknown = contenders([1, 2, 3, 4], [1, np.nan, -np.inf, 3], [2, 1, np.inf, 4])
    assert unknown.tolist() == [True, False, True, False]
    assert frontier([], []).tolist() == contenders([], [], []).tolist() == []


def test_equal_models_are_all_on_the_frontier():
    assert frontier([1, 1, 2, 3], [5, 5, 5, 4]).tolist() == [True, True, False, True]
    assert contenders([1, 1, 2, 3], [4, 4, 6, 3], [5, 5, 7, 4.5]).tolist() == [True, True, False, True]

"""The choice of weights to remove: exact counts, ties to the lower column, and slow references."""

from itertools import combinations
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.compress.select import (
    _threshold,
    by_pieces,
    extend_by_row,
    extend_mask,
    random_scores,
    smallest,
    smallest_in_groups,
    smallest_overall,
    wanda_scores,
)
from tests import families
from tests.pruners import SPARSITY, slow_mask, weights

pytestmark = pytest.mark.device

PATTERNS = [(2, 4), (4, 8), (1, 4), (1, 2), (3, 4)]


def lowest_by_row(scores: torch.Tensor, count: int) -> torch.Tensor:
    return extend_by_row(scores.__getitem__, torch.zeros_like(scores, dtype=torch.bool), count)


@given(weights(), SPARSITY)
def test_the_smallest_of_all_and_of_each_row(weight, share):
    rows, columns = weight.shape
    count = floor(share * weight.numel())
    overall = torch.tensor(slow_mask(weight.flatten().tolist(), count)).view(rows, columns)
    there = weight.to(families.DEVICE)
    assert torch.equal(smallest_overall(there, count).cpu(), overall)
    each = floor(share * columns)
    by_row = torch.tensor([slow_mask(row.tolist(), each) for row in weight])
    assert torch.equal(smallest(there, each).cpu(), by_row)
    assert torch.equal(lowest_by_row(there, each * rows).cpu(), by_row)


def test_a_cards_threshold_is_the_last_of_the_lowest():
    scores = torch.randint(0, 5, (7, 12), generator=torch.Generator().manual_seed(0)).float()
    scores[0, :4] = -torch.inf
    for count in range(1, 13):
        expected = scores.sort(dim=1).values[:, count - 1 : count]
        assert torch.equal(_threshold(scores.to(families.DEVICE), count).cpu(), expected)


@given(weights(), st.data())
def test_every_row_can_have_its_own_count(weight, data):
    rows, columns = weight.shape
    counts = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    expected = torch.tensor([slow_mask(row.tolist(), n) for row, n in zip(weight, counts, strict=True)])
    assert torch.equal(smallest(weight.to(families.DEVICE), torch.tensor(counts)).cpu(), expected)


@given(weights(), SPARSITY)
def test_a_count_that_rows_cannot_share_evenly_is_met(weight, share):
    rows = len(weight)
    count = floor(share * weight.numel())
    mask = lowest_by_row(weight, count)
    counts = mask.sum(1).tolist()
    assert sum(counts) == count
    assert max(counts) - min(counts) <= 1
    for row, number in enumerate(counts):
        assert mask[row].tolist() == slow_mask(weight[row].tolist(), number)
    # Rows that lose one more are evenly spaced.
    for stop in range(rows + 1):
        assert abs(sum(counts[:stop]) - count * stop / rows) < 1


@given(st.data(), st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 3))
def test_n_of_m_is_the_exhaustive_choice(data, pattern, rows, groups):
    keep, size = pattern
    length = rows * groups * size
    values = data.draw(st.lists(st.integers(0, 6), min_size=length, max_size=length))
    scores = torch.tensor(values, dtype=torch.float32, device=families.DEVICE).view(rows, groups * size)
    gone = smallest_in_groups(scores, keep, size)
    for row in range(rows):
        for start in range(0, groups * size, size):
            group = scores[row, start : start + size].tolist()
            # The choice that keeps most; among equals the one that removes the lowest columns.
            best = min(
                combinations(range(size), size - keep), key=lambda out: (sum(group[i] for i in out), out)
            )
            assert gone[row, start : start + size].nonzero().flatten().tolist() == list(best)


@given(st.data())
def test_a_mask_grows_by_the_lowest_scores_to_an_exact_count(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    values = st.lists(st.integers(0, 4), min_size=rows * columns, max_size=rows * columns)
    scores = torch.tensor(data.draw(values), device=families.DEVICE).view(rows, columns).float()
    gone = torch.tensor(data.draw(values), device=families.DEVICE).view(rows, columns) == 0
    count = data.draw(st.integers(0, rows * columns))
    for by_row in (True, False):
        mask = extend_mask(scores.__getitem__, gone, count, by_row=by_row)
        assert mask[gone].all()
        assert int(mask.sum()) == max(count, int(gone.sum()))
        parts = zip(mask, scores, gone, strict=True) if by_row else [(mask, scores, gone)]
        for part, values_, before in parts:
            new, left = values_[part & ~before], values_[~part]
            assert not (new.numel() and left.numel()) or new.max() <= left.min()
    before, after = gone.sum(1), extend_by_row(scores.__getitem__, gone, count).sum(1)
    raised = after[after > before]
    assert not raised.numel() or int(raised.max()) <= int(after.min()) + 1


@pytest.mark.cpu("pieces are larger elsewhere")
def test_pieces_are_joined_in_order(device):
    wide = torch.zeros(5, 2**17, device=device)
    wide[::2] = 1
    pieces: list[tuple[int, int]] = []

    def choose(rows: slice) -> torch.Tensor:
        pieces.append((rows.start, rows.stop))
        return wide[rows] == 0

    assert torch.equal(by_pieces(wide, choose), wide == 0)
    assert pieces == [(0, 2), (2, 4), (4, 6)]


def test_random_scores_depend_on_seed_and_name_only():
    scores = random_scores(0, "a", 3, 4)
    torch.rand(7)  # the global generator plays no part
    assert scores.shape == (3, 4) and torch.equal(random_scores(0, "a", 3, 4), scores)
    assert not torch.equal(random_scores(1, "a", 3, 4), scores)
    assert not torch.equal(random_scores(0, "b", 3, 4), scores)


def test_wanda_scores_are_weights_times_norms():
    weight, norm = torch.tensor([[-2.0, 1.0], [3.0, -4.0]]), torch.tensor([1.0, 3.0])
    assert wanda_scores(weight, norm)(slice(1, 2)).tolist() == [[3.0, 12.0]]

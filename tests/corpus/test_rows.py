"""Rows and batches: every example kept, none longer than a row, padding outside all of them."""

import pytest
import torch

from stages.corpus.rows import IGNORED, Example, TopLogits, collate, example, pack

SIZES = [(30, 20), (17, 1), (9, 5), (26, 3), (12, 11), (7, 6), (3, 2)]
"""Tokens of each example, and the place where its answer starts."""


def examples() -> list[Example]:
    draw = torch.Generator().manual_seed(3)
    return [example(torch.randint(1, 256, (size,), generator=draw), start) for size, start in SIZES]


def size(row: tuple[Example, ...]) -> int:
    return sum(len(item.input_ids) for item in row)


def test_packing_keeps_every_example_in_rows_that_fit():
    rows = pack(examples(), 40)
    packed = [item.input_ids.tolist() for row in rows for item in row]
    assert sorted(packed) == sorted(item.input_ids.tolist() for item in examples())
    sizes = sorted(map(size, rows))
    assert sizes[-1] <= 40
    # No two rows would fit into one.
    assert all(a + b > 40 for i, a in enumerate(sizes) for b in sizes[i + 1 :])


def test_the_first_token_of_an_example_is_never_predicted():
    assert example(torch.tensor([5, 6, 7]), 0).labels.tolist() == [IGNORED, 6, 7]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_holds_its_rows_and_padding_that_is_not_predicted(packed):
    rows = pack(examples(), 40) if packed else [(item,) for item in examples()]
    batch = collate(rows)
    length = max(map(size, rows))
    assert batch.input_ids.shape == batch.labels.shape == (len(rows), length)
    assert list(batch.longest) == [max(len(item.input_ids) for item in row) for row in rows]
    assert sum(batch.sizes) == sum(map(size, rows)) == int((batch.input_ids != 0).sum())
    assert batch.predicted == int((batch.labels != IGNORED).sum())
    assert batch.predicted == sum(length - start for length, start in SIZES)
    if not packed:
        assert batch.position_ids is None
        return
    for row, positions in zip(rows, batch.position_ids.tolist(), strict=True):
        parts = [len(item.input_ids) for item in row]
        assert positions == [at for part in parts for at in range(part)] + [0] * (length - sum(parts))
        assert all(position < max(parts) for position in positions)


def test_a_teacher_of_some_examples_only_is_a_bug():
    first, second, *_ = examples()
    teacher = TopLogits(torch.zeros(10, 1, dtype=torch.long), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="all or none"):
        collate([(Example(first.input_ids, first.labels, teacher),), (second,)])

"""A block's call in batches: it computes the same, and what blocks leave for later blocks reaches these."""

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch

from stages.compress.batches import BatchedCall, check_call, check_rows
from stages.compress.capture import call_of
from stages.core.errors import Refusal
from stages.model.blocks import blocks, forward
from tests import families

pytestmark = [pytest.mark.numerics, pytest.mark.device]
Pair = namedtuple("Pair", "left right")


def windows(count: int, length: int = 24) -> torch.Tensor:
    return families.windows(count, length, high=250)


@pytest.mark.parametrize("family", [*families.CONFIGS, *families.RARE])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_blocks_compute_the_same_in_batches(size, family):
    """There are as many windows as heads, which no shape tells apart."""
    model = families.wide(family)
    single = call_of(blocks(model)[0][1], lambda: forward(model, windows(1)))
    with torch.no_grad():
        plain = model.base_model(windows(4), use_cache=False).last_hidden_state

    def step(original):
        def in_batches(*args: Any, **kwargs: Any) -> Any:
            batches = BatchedCall((args, kwargs), 4, size, single)
            assert len(batches) == -(-4 // size)
            for number in (0, *range(len(batches))):  # the first one twice, which must not show
                batches.run(original, number)
            return batches.join()

        return in_batches

    for _, block in blocks(model):
        block.forward = step(block.forward)
    with torch.no_grad():
        joined = model.base_model(windows(4), use_cache=False).last_hidden_state
    torch.testing.assert_close(joined, plain, rtol=1e-4, atol=1e-5)


def test_what_has_no_row_for_every_window_is_shared():
    mask = torch.ones(1, 1, 24, 24)
    stream, by_head = torch.arange(4.0).view(4, 1), torch.arange(16.0)
    call = (stream,), {"mask": mask, "pair": Pair(by_head, None), "names": ["a"]}
    single = (stream[:1],), {"mask": mask, "pair": Pair(by_head[:4], None), "names": ["a"]}
    calls = []
    batches = BatchedCall(call, 4, 3, single)
    for number in range(2):
        batches.run(lambda *args, **kwargs: calls.append((args, kwargs)), number)
    assert [args[0].flatten().tolist() for args, _ in calls] == [[0, 1, 2], [3]]
    assert [len(kwargs["pair"].left) for _, kwargs in calls] == [12, 4]
    for _, kwargs in calls:
        assert kwargs["mask"] is mask and kwargs["names"] == ["a"] and kwargs["pair"].right is None


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", [dict, UserDict, list])
def test_what_a_block_writes_is_joined_for_later_blocks(kind, size):
    stream, kept = torch.arange(3.0).view(3, 1), torch.zeros(3)
    shared = kind([kept]) if kind is list else kind(kept=kept, pair=(kept, kept))

    def block(x: torch.Tensor, shared: Any) -> torch.Tensor:
        if isinstance(shared, list):
            shared.append(x * 10)
        else:
            shared["pair"] = (x, x * 10)
            shared["new"] = {"deep": x + 1}
        return x

    batches = BatchedCall(((stream,), {"shared": shared}), 3, size, ((stream[:1],), {"shared": shared}))
    for number in (*range(len(batches)), *range(len(batches))):
        batches.run(block, number)
    assert len(shared) == (1 if kind is list else 2)  # not before all have run
    assert torch.equal(batches.join(), stream)
    if kind is list:
        assert len(shared) == 2 and shared[0] is kept and torch.equal(shared[1], stream * 10)
    else:
        assert shared["kept"] is kept and torch.equal(shared["pair"][1], stream * 10)
        assert torch.equal(shared["new"]["deep"], stream + 1)


def test_a_block_that_leaves_different_things_by_batch_is_refused():
    stream = torch.arange(2.0).view(2, 1)

    def run(block: Any) -> None:
        shared: dict[str, Any] = {}
        batches = BatchedCall(((stream, shared), {}), 2, 1, ((stream[:1], shared), {}))
        for number in range(2):
            batches.run(block, number)
        batches.join()

    def by_window(x: torch.Tensor, shared: dict[str, Any]) -> torch.Tensor:
        shared[f"{int(x)}"] = x
        return x

    with pytest.raises(Refusal, match="writes different entries"):
        run(by_window)
    with pytest.raises(Refusal, match="Tensor that differs between batches"):
        run(lambda x, shared: (x, x.sum()))
    with pytest.raises(Refusal, match="int that differs between batches"):
        run(lambda x, shared: (x, int(x)))


@pytest.mark.parametrize(
    "inside", [lambda cache: cache, lambda cache: [cache], lambda cache: {"a": (cache,)}]
)
def test_an_argument_of_another_kind_is_refused_by_name(inside):
    call = (torch.ones(2, 1), None, 3, "a", torch.float32), {"past": inside(object())}
    with pytest.raises(Refusal, match=r"^layers\.3 is handed past \(\w+\), which cannot be divided"):
        check_call("layers.3", call)
    check_call("layers.3", (call[0], {}))


def test_a_stream_with_its_windows_in_another_dimension_is_refused():
    def call(count: int) -> Any:
        return (torch.ones(2, count, 8, 4),), {"mask": torch.ones(count, 1), "cos": (torch.ones(1, 8),)}

    with pytest.raises(Refusal, match=r"^layers\.0 is handed a tensor \[2, 3, 8, 4\] that is \[2, 1, 8, 4\]"):
        check_rows("layers.0", call(3), call(1))
    check_rows("layers.0", ((), call(3)[1]), ((), call(1)[1]))

"""The kernel that settles columns against the loop, entry by entry, and its choices certified in fp64.

On a CPU it runs in Triton's interpreter.
"""

import logging
from functools import partial
from subprocess import CalledProcessError
from unittest.mock import Mock

import pytest
import torch

from stages.compress import surgeon
from stages.compress.rounding import Rounding
from stages.compress.statistics import Hessian
from stages.model.grid import Integers
from stages.quantization.gptq import GPTQ
from tests.pruners import hessian, problem, sparsegpt
from tests.replay import certify_gptq, certify_sparsegpt

pytest.importorskip("triton", reason="Triton is not installed")
settling = pytest.importorskip("stages.compress.settling")
pytestmark = pytest.mark.device


@pytest.fixture
def fused(device, monkeypatch):
    """Let the kernel settle columns on any device."""
    if device.type == "cpu" and not settling.triton.knobs.runtime.interpret:
        pytest.skip("on a machine with a GPU the kernel runs with --device cuda")
    monkeypatch.setattr(surgeon, "fused", lambda work: True)


def test_it_settles_columns_on_a_gpu_only(device):
    assert surgeon.fused(torch.zeros(1, device=device)) == (device.type == "cuda")


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'triton'"), RuntimeError("Failed to find C compiler."),
              CalledProcessError(1, "gcc"), PermissionError("/.triton"), OSError(28, "No space left")],
)  # fmt: skip
def test_the_loop_takes_its_place_where_it_cannot_be_compiled(error, device, fused, monkeypatch, caplog):
    surgeon.compiles.cache_clear()
    assert surgeon.compiles(device)
    surgeon.compiles.cache_clear()
    monkeypatch.setattr(settling, "settle", Mock(side_effect=error))
    logging.disable(logging.NOTSET)
    assert not surgeon.compiles(device)
    assert "use a slower loop" in caplog.text and str(error) in caplog.text
    surgeon.compiles.cache_clear()
    monkeypatch.setattr(settling, "settle", Mock(side_effect=RuntimeError("Triton Error: out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        surgeon.compiles(device)


GRIDS = [None, Integers(4, 8), Integers(3, None), Integers(2, 8), Integers(8, 8, symmetric=False)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_settles_as_the_loop_does(dtype, grid, device, fused):
    weight, (work, errors, *codes) = settled(grid, dtype, device, 40, 11, slice(9, 33))
    assert errors.any() and errors.isfinite().all()
    assert torch.equal(work[:9], weight[:9]) and torch.equal(work[33:], weight[33:])
    assert not codes or (codes[0][9:33].any() and not codes[0][:9].any() and not codes[0][33:].any())


@pytest.mark.parametrize("grid", [None, Integers(2, None), Integers(4, None, symmetric=False)])
@pytest.mark.parametrize(("columns", "rows"), [(1, 11), (17, 1), (1, 1)])
def test_it_settles_a_matrix_of_one_column_or_row(columns, rows, grid, device, fused):
    _, (work, errors, *_) = settled(grid, torch.bfloat16, device, columns, rows, slice(0, columns))
    assert work.shape == errors.shape == (columns, rows) and errors.isfinite().all()


def settled(
    grid: Integers | None, dtype: torch.dtype, device: torch.device, columns: int, rows: int, block: slice
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A weight `[columns, rows]`, and what loop and kernel alike make of its `block`.

    Its sums and products are exact, so their order is free.
    """
    draw = torch.Generator().manual_seed(1)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draw).float().to(device)

    weight = whole(-255, 256, columns, rows) / 64
    gone = whole(0, 4, columns, rows) == 0
    moves = whole(-1, 2, columns, columns) * (whole(0, 6, columns, columns) == 0)
    moves = moves.triu(1) + torch.eye(columns, device=device)
    results = []
    for settle in (surgeon._settle, partial(settling.settle, rows=8)):
        work, rounding = weight.clone(), None
        errors = torch.full((block.stop - block.start, rows), torch.nan, device=device)
        if grid:
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)).to(device)
            rounding = Rounding(grid, work, dtype, order)
            shape = rounding.scale.shape
            few = torch.Generator().manual_seed(2)
            rounding.scale.copy_(torch.randint(33, 64, shape, generator=few) / 64)
            if rounding.zero is not None:
                rounding.zero.copy_(torch.randint(-9, 9, shape, generator=few))
        settle(work, moves, gone, rounding, errors, block)
        results.append(
            [work, errors] + ([rounding.codes, rounding.result(slice(0, rows)).codes] if rounding else [])
        )
    for mine, loop in zip(*results, strict=True):
        assert torch.equal(mine, loop)
    return weight, results[0]


@pytest.mark.parametrize(
    ("rows", "columns", "options"),
    [
        (3, 40, {"group_size": 8}), (5, 24, {"group_size": None, "symmetric": False}),
        (3, 32, {"group_size": 16, "act_order": True, "static_groups": True}),
        pytest.param(2, 320, {"group_size": 160}, marks=pytest.mark.drill),
    ],
)  # fmt: skip
def test_gptq_makes_no_wrong_choice(rows, columns, options, fused):
    weight, inputs = problem(seed=1, rows=rows, columns=columns, tokens=4 * columns)
    weight[:, ::5] = 0
    inputs[:, 3] = 0  # dead
    method = GPTQ(
        source="base/m", method="gptq", bits=4, damping=0.1, calibration={"dataset": "news"}, **options
    )
    codes = method.weights(weight, hessian(inputs))
    certify_gptq(
        codes, weight, hessian(inputs), 0.1, act_order=method.act_order, static_groups=method.static_groups
    )


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (144, {}), (24, {"structure": "2:4"}),
        (24, {"structure": "1:3", "grid": {"bits": 3, "group_size": 8}}),
        (48, {"grid": {"bits": 4, "group_size": None}}),
    ],
)  # fmt: skip
def test_sparsegpt_makes_no_wrong_choice(columns, options, fused):
    weight, inputs = problem(seed=2, rows=3, columns=columns, tokens=4 * columns)
    weight[:, ::7] = 0
    inputs[:, 3] = 0  # dead
    statistic: Hessian = hessian(inputs)
    keep, size = (int(part) for part in options.get("structure", "1:2").split(":"))
    method, zeros = sparsegpt(1 - keep / size, damping=0.1, **options), weight.numel() // 2
    result = method.weights(weight, statistic, zeros)
    certify_sparsegpt(result, weight, statistic, 0.1, zeros=zeros, pattern=method.pattern)

"""Packed files hold the codes that were computed, in every format and at every width."""

import copy
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.model.blocks import linears
from stages.model.grid import Codes, Int8, Integers, Quantized, bounds
from stages.model.packed import FORMATS, code_from, tensors_of, weight_from
from tests import families
from tests.pipeline import NONE, dense, do, load, params, record

NAME = "model.layers.0.mlp.up_proj"


def weight(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(12, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(bits: int, group_size: int | None, symmetric: bool) -> Codes:
    """Draw codes and zero points from their whole range."""
    generator, (low, high) = torch.Generator().manual_seed(bits), bounds(bits)
    groups = 96 // (group_size or 96)
    codes = torch.randint(low, high + 1, (12, 96), generator=generator, dtype=torch.int8)
    zero = torch.randint(low, high + 1, (12, groups), generator=generator, dtype=torch.int8)
    scale = torch.rand(12, groups, generator=generator).bfloat16()
    return Codes(codes, scale, bits, group_size, None if symmetric else zero)


def written(code: Quantized, folder) -> dict[str, torch.Tensor]:
    """Write codes to a file and read its tensors."""
    save_file(tensors_of(NAME, code), folder / "model.safetensors", metadata={"format": "pt"})
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [8, 32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_codes_are_read_back(bits, group_size, symmetric, tmp_path):
    code = drawn(bits, group_size, symmetric)
    stored, scheme = written(code, tmp_path), code.scheme()
    again = code_from(stored, f"{NAME}.weight", scheme)
    assert isinstance(again, Codes)
    assert torch.equal(again.codes, code.codes) and torch.equal(again.scale, code.scale)
    assert (again.bits, again.group_size) == (bits, group_size)
    assert (again.zero_point is None) == symmetric
    if not symmetric:
        assert torch.equal(again.zero_point, code.zero_point)
    assert torch.equal(weight_from(stored, f"{NAME}.weight", scheme), code.dequantize())
    # Packing pads the codes of a row, and the zero points of a column, to whole words.
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) - 2 * 8
    assert (
        0 <= size * 8 - code.stored_bits() < 32 * len(code.codes) + 32 * code.scale.shape[1] * (not symmetric)
    )


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_few_outputs_are_read_back(rows, bits, tmp_path):
    code = Integers(bits, 8, symmetric=False).nearest(weight(0)[:rows])
    again = code_from(written(code, tmp_path), f"{NAME}.weight", code.scheme())
    assert torch.equal(again.zero_point, code.zero_point)
    assert torch.equal(again.dequantize(), code.dequantize())


@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("shared", [1, 2])
def test_plain_transformers_loads_packed_linears_of_few_outputs(shared, group_size, workspace, monkeypatch):
    """The library fails on 4-bit zero points of several groups of 8 outputs (keys, values): dense is written."""
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.num_key_value_heads = shared
    monkeypatch.setitem(families.CONFIGS, "few", config)
    monkeypatch.setitem(families.IN_FEATURES, "few", families.IN_FEATURES["llama"])
    shutil.copytree(workspace / "inputs", workspace / "own", symlinks=True)
    (workspace / "inputs").unlink()
    (workspace / "own").rename(workspace / "inputs")
    families.save("few", workspace / "inputs" / "few")
    recipe = {
        "source": "base/tiny", "method": "rtn", "bits": 4, "group_size": group_size, "symmetric": False,
        "calibration": NONE,
    }  # fmt: skip
    do(params("few", {"quantize/rtn": recipe}))
    packed = shared == 2 or group_size is None
    assert record("quantize/rtn")["layout"] == ("pack-quantized" if packed else "fake_quantized")
    base, grid = load("base/tiny"), Integers(4, group_size, symmetric=False)
    modules = dict(dense(load("quantize/rtn")).named_modules())
    for linear in linears(base):
        expected = grid.nearest(linear.weight).dequantize()
        assert torch.equal(modules[linear.name].weight, expected), linear.name


def test_eight_bit_codes_of_linears_with_rounded_inputs_are_read_back(tmp_path):
    near = Integers(8, None).nearest(weight(0))
    code = Int8(near.codes, near.scale)
    stored = written(code, tmp_path)
    assert {name.removeprefix(f"{NAME}.") for name in stored} == {"weight", "weight_scale"}
    again = code_from(stored, f"{NAME}.weight", code.scheme())
    assert isinstance(again, Int8) and torch.equal(again.codes, near.codes)
    assert torch.equal(again.dequantize(), near.dequantize())
    assert code.stored_bits() == near.stored_bits() and code.nonzero() == near.nonzero()


def test_dense_tensors_are_read_as_they_are():
    stored = {"norm.weight": torch.ones(4)}
    schemes: list[dict[str, Any] | None] = [None, Integers(4, 8).nearest(weight(0)).scheme()]
    for scheme in schemes:
        assert weight_from(stored, "norm.weight", scheme) is stored["norm.weight"]


def test_every_format_is_one_of_the_library():
    from compressed_tensors.config import CompressionFormat

    assert set(FORMATS) <= {known.value for known in CompressionFormat}

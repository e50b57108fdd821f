"""Float grids: the library's arithmetic, the papers' tables, and files that hold what was computed."""

import re

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.model.floats import E4M3_MAX, Float8, MXFloat4, NVFloat4
from stages.model.grid import Integers, Quantized
from stages.model.packed import FORMATS, code_from
from stages.quantization.nf4 import NF4, levels
from tests.families import DEVICE

pytestmark = [pytest.mark.numerics, pytest.mark.device]
SEED = st.integers(0, 2**31)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=DEVICE)
# The paper's table, 2305.14314 appendix E.
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
MAKE = {
    "fp8 by row": lambda w: Float8.nearest(w, by_row=True, dynamic=False),
    "fp8 as a whole": lambda w: Float8.nearest(w, by_row=False, dynamic=False),
    "fp8 with inputs": lambda w: Float8.nearest(w, by_row=True, dynamic=True),
    "mxfp4": MXFloat4.nearest,
    "nvfp4": NVFloat4.nearest,
}


def weight(seed: int = 0, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(12, 1, generator=generator).to(DEVICE))
    return (torch.randn(12, 96, generator=generator).to(DEVICE) * rows * 0.05).to(dtype)


def nf4(group_size: int | None = 16, double_quant: bool = False) -> NF4:
    return NF4(
        source="base/m", method="nf4", group_size=group_size, double_quant=double_quant,
        calibration={"dataset": "none"},
    )  # fmt: skip


def the_librarys(values: torch.Tensor, code: Quantized) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that compressed-tensors stores of `values` under the code's scheme, and reads back."""
    code_scheme = code.scheme()
    args = QuantizationArgs(**code_scheme["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": values.float()}
    if args.strategy == "tensor":
        low, high = values.amin().view(1), values.amax().view(1)
    else:
        parts = values.unflatten(1, (-1, args.group_size or values.shape[1]))
        low, high = parts.amin(2), parts.amax(2)
    whole = generate_gparam(values.amin().float(), values.amax().float()).view(1)
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = whole
    scale, _ = calculate_qparams(low.float(), high.float(), args, state.get("weight_global_scale"))
    # Where a format has no dtype for scales, they are stored in the model's.
    state["weight_scale"] = scale if args.scale_dtype else scale.to(values.dtype).float()
    library = BaseCompressor.get_value_from_registry(code_scheme["format"])
    stored = library.compress(state, scheme)
    stored["weight_scale"] = stored["weight_scale"].to(code.tensors()["weight_scale"].dtype)
    return stored, library.decompress(stored, scheme)["weight"]


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["fp8 by row", "fp8 as a whole", "mxfp4", "nvfp4"]), SEED,
    st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_codes_and_scales_are_the_librarys(kind, seed, dtype, spread):
    values = weight(seed, dtype, spread)
    code = MAKE[kind](values)
    stored, read = the_librarys(values, code)
    assert code.tensors().keys() == stored.keys()
    again = code_from({f"linear.{name}": t for name, t in stored.items()}, "linear.weight", code.scheme())
    assert torch.equal(again.codes.float(), code.codes.float())  # the library's have both 0 and -0
    assert torch.equal(again.scale.float(), code.scale.float())
    assert torch.equal(code.dequantize(), read.to(code.dequantize().dtype))


@pytest.mark.parametrize("kind", MAKE)
@given(SEED, st.floats(0, 1), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_zeros_stay_zero_and_a_file_reads_back_the_same(kind, seed, share, dtype):
    values = weight(seed, dtype)
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < share] = 0
    code = MAKE[kind](values)
    dense = code.dequantize()
    assert dense.shape == values.shape and dense.isfinite().all()
    assert (dense[values == 0] == 0).all()
    assert code.nonzero() == torch.count_nonzero(dense) <= torch.count_nonzero(values)
    stored = {f"linear.{name}": tensor for name, tensor in code.tensors().items()}
    again = code_from(stored, "linear.weight", code.scheme())
    assert type(again) is type(code) and again.scheme() == code.scheme()
    assert torch.equal(again.dequantize(), dense.cpu())
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), stored[f"linear.{name}"].view(torch.uint8))


@pytest.mark.parametrize("kind", MAKE)
def test_bits_are_those_of_the_file(kind):
    code = MAKE[kind](weight())
    assert code.stored_bits() == 8 * sum(t.numel() * t.element_size() for t in code.tensors().values())


@pytest.mark.parametrize(("kind", "bits"), [("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_bits_a_weight(kind, bits):
    code = MAKE[kind](torch.randn(64, 512).to(DEVICE))
    assert code.stored_bits() / (64 * 512) == pytest.approx(bits, abs=0.01)


@given(SEED, st.sampled_from(["mxfp4", "nvfp4"]))
def test_four_bits_are_the_nearest(seed, kind):
    values = weight(seed, torch.float32)
    code = MAKE[kind](values)
    factor = code.factor().repeat_interleave(96 // code.scale.shape[1], 1)
    grid = torch.cat([E2M1, -E2M1])
    best = (factor[..., None] * grid - values[..., None]).abs().amin(2)
    torch.testing.assert_close((code.codes * factor - values).abs(), best, rtol=1e-5, atol=1e-8)


@given(SEED)
def test_a_groups_largest_weight_uses_the_grids_range(seed):
    values = weight(seed, torch.float32)
    peaks = values.abs().unflatten(1, (-1, 32)).amax(2) / MXFloat4.nearest(values).factor()
    assert (peaks >= 3.5).all() and (peaks < 7).all()
    finer = NVFloat4.nearest(values)
    assert finer.scale.float().max() == E4M3_MAX
    assert finer.codes.abs().max() == 6


@pytest.mark.parametrize("kind", MAKE)
def test_zeros_and_tiny_groups_are_served(kind):
    zeros = torch.zeros(4, 64, device=DEVICE)
    assert torch.equal(MAKE[kind](zeros).dequantize().float(), zeros)
    tiny = torch.ones(4, 64, device=DEVICE)
    tiny[:, 32:] = 1e-30
    dense = MAKE[kind](tiny).dequantize()
    assert dense.isfinite().all() and (dense[:, 32:] < 1e-6).all()
    assert dense[0, 0] == 1


ROUND = MAKE | {
    "nf4": lambda w: nf4(16).weights(w, None),
    "nf4, scales too": lambda w: nf4(16, double_quant=True).weights(w, None),
    "int2": Integers(2, 16).nearest,
    "int4": Integers(4, 16).nearest,
    "int8 by row": Integers(8, None).nearest,
    "int4 with a zero point": Integers(4, 16, symmetric=False).nearest,
}


@pytest.mark.parametrize("kind", ROUND)
@given(SEED, st.integers(-46, 38), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
@settings(deadline=None)
def test_weights_of_any_size_are_rounded_to_finite_nonzero_ones_or_refused(kind, seed, exponent, dtype):
    values = weight(seed, torch.float32, spread=0.3).double().mul(10.0**exponent).to(dtype)
    if not (values.isfinite().all() and values.any()):
        return
    try:
        rounded = ROUND[kind](values).checked(values)
    except Refusal as refusal:
        largest = values.abs().max().item()
        assert re.search(r"too small for the grid's scales|leave the range of torch\.", str(refusal))
        # Refused only near the ends of the dtype of scales, of their sum, or of the result.
        assert largest < 1e-36 or largest > torch.finfo(dtype).max / 100
        return
    assert rounded.dtype == dtype and rounded.isfinite().all() and rounded.any()
    assert (rounded[values == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["fp8 by row", "fp8 as a whole", "nvfp4", "nf4", "int4", "int8 by row"])
def test_tiny_weights_are_rounded_as_well_as_others(kind, dtype):
    tiny = weight(0, torch.float32).mul(2.0**-118).to(dtype)  # 1e-37 or so
    large = tiny.double().mul(2.0**118).to(dtype)

    def error(values: torch.Tensor) -> float:
        rounded = ROUND[kind](values).checked(values).double()
        return float((rounded - values.double()).norm() / values.double().norm())

    assert error(tiny) < 1.1 * error(large) + 1e-3


def test_weights_below_every_scale_are_refused():
    for kind in ("mxfp4", "nvfp4"):
        values = torch.full((4, 64), 1e-45, device=DEVICE)
        with pytest.raises(Refusal, match=r"^its weights, 1\.4e-45 at most, are too small for the grid"):
            ROUND[kind](values).checked(values)


def test_rounded_weights_outside_the_range_of_the_dtype_are_refused():
    values = torch.full((4, 64), 3.4e38, device=DEVICE)
    with pytest.raises(Refusal, match=r"^rounded to 4 bits, weights of up to 3\.4e\+38 leave the range of"):
        ROUND["mxfp4"](values).checked(values)


def test_nearly_equal_scales_of_nf4_stay_finite():
    """Their distances from the mean are then among the smallest fp32 numbers."""
    values = (1 + torch.rand(64, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 1e-4) * 1e-38
    assert nf4(16, double_quant=True).weights(values, None).checked(values).any()


def test_levels_of_nf4_are_the_papers():
    # The paper computed them in another precision.
    assert levels().tolist() == pytest.approx(LEVELS, abs=1e-6)
    assert levels()[7] == 0


@given(SEED, st.sampled_from([8, 32, None]), st.booleans(), st.floats(0, 1))
def test_nf4_is_nearest_and_keeps_zeros(seed, group_size, double_quant, share):
    values = weight(seed, torch.float32)
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < share] = 0
    code = nf4(group_size, double_quant).weights(values, None)
    assert code.scheme() is None
    dense = code.dequantize()
    assert (dense[values == 0] == 0).all()
    scale = code.scale.repeat_interleave(96 // code.scale.shape[1], 1)
    best = (scale[..., None] * torch.tensor(LEVELS, device=DEVICE) - values[..., None]).abs().amin(2)
    torch.testing.assert_close((dense - values).abs(), best, rtol=1e-4, atol=1e-6)


def test_nf4_counts_its_scales():
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    plain, twice = (nf4(64, double).weights(values, None) for double in (False, True))
    count = values.numel()
    assert plain.stored_bits() / count == 4 + 32 / 64
    assert twice.stored_bits() == count * 4 + count // 64 * 8 + count // 64 // 256 * 32 + 32
    error = (twice.scale - plain.scale).abs().max()
    assert 0 < error < 0.04 * (plain.scale - plain.scale.mean()).abs().max()


def test_every_format_has_a_grid():
    formats = [make(weight()).scheme()["format"] for make in MAKE.values()]
    assert {"pack-quantized", "int-quantized", *formats} == set(FORMATS)

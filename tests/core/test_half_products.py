"""Products of bf16 and fp16 matrices in fp32, on a processor without instructions for them."""

import subprocess
import sys

import pytest
import torch

from stages.core import half_products

SCRIPT = """
import warnings

import torch

warnings.simplefilter("error")
torch.manual_seed(0)
dtype = torch.{dtype}
first, second, third = (torch.randn(shape) for shape in ((2, 5, 7), (2, 7, 3), (2, 5, 3)))
wide_before = [first @ second, first[0] @ second[0], torch.addmm(third[0], first[0], second[0])]

from stages.core import half_products

half_products.widen([])
half_products.widen(["bfloat16"])
half_products.widen(["float16"])

# fp32 goes to the kernels of before, to the bit.
wide_after = [first @ second, first[0] @ second[0], torch.addmm(third[0], first[0], second[0])]
assert all(torch.equal(one, other) for one, other in zip(wide_before, wide_after, strict=True))

widened = []
float_of = torch.Tensor.float
torch.Tensor.float = lambda tensor: (widened.append(tensor.dtype), float_of(tensor))[1]
a, b, c = first.to(dtype), second.to(dtype), third.to(dtype)
exact_a, exact_b, exact_c = a.double(), b.double(), c.double()
pairs = {{
    "bmm": (a @ b, exact_a @ exact_b),
    "mm": (a[0] @ b[0], exact_a[0] @ exact_b[0]),
    "addmm": (torch.addmm(c[0], a[0], b[0], beta=2), 2 * exact_c[0] + exact_a[0] @ exact_b[0]),
    "alpha": (torch.addmm(c[0], a[0], b[0], alpha=0.5), exact_c[0] + exact_a[0] @ exact_b[0] / 2),
    "baddbmm": (torch.baddbmm(c, a, b, beta=3.0), 3 * exact_c + exact_a @ exact_b),
    "linear": (torch.nn.functional.linear(a, b[0].T, c[0, 0]), exact_a @ exact_b[0] + exact_c[0, 0]),
}}
torch.Tensor.float = float_of
assert widened and set(widened) == {{dtype}}, "the products are those of fp32 kernels"
for name, (product, exact) in pairs.items():
    assert product.dtype == dtype, name
    # One rounding of the sum: half a unit in the last place, and a hair for the sums in fp32.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert ((product.double() - exact).abs() <= bound).all(), name

leaf, weight = a[0].clone().requires_grad_(), b[0].clone().requires_grad_()
(leaf @ weight).float().square().sum().backward()
assert leaf.grad.dtype == weight.grad.dtype == dtype
upstream = (2 * (leaf @ weight)).detach().double()
assert torch.allclose(leaf.grad.double(), upstream @ weight.detach().double().T, rtol=2e-2, atol=1e-2)
assert torch.allclose(weight.grad.double(), leaf.detach().double().T @ upstream, rtol=2e-2, atol=1e-2)
with torch.inference_mode():
    assert torch.equal(a @ b, pairs["bmm"][0])

# A matrix as of a large vocabulary is widened a slice at a time, with any shape of what is added.
linear, words = torch.nn.functional.linear, torch.randn(11, 7).to(dtype)
half_products._SLICE, sizes = 15, []
torch.Tensor.float = lambda tensor: (sizes.append(tensor.numel()), float_of(tensor))[1]
for bias in (torch.randn(11).to(dtype), None):
    product = linear(a[0], words, bias)
    exact = exact_a[0] @ words.double().T + (0 if bias is None else bias.double())
    assert product.dtype == dtype and product.shape == (5, 11)
    assert ((product.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()
added = torch.randn(5, 1).to(dtype)
exact = added.double() / 2 + exact_a[0] @ words.double().T
product = torch.addmm(added, a[0], words.T, beta=0.5)
assert ((product.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()
torch.Tensor.float = float_of
assert words.numel() not in sizes and sizes.count(14) == 3 * 5
print("done")
"""


@pytest.mark.parametrize("dtype", half_products.HALVES)
def test_products_are_summed_in_fp32_and_rounded_once(dtype):
    """In a process of its own: the kernels stay replaced in the one that asks."""
    script = [sys.executable, "-c", SCRIPT.format(dtype=dtype)]
    ran = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ran.stdout == "done\n", ran.stderr


def test_a_processor_without_instructions_is_known(monkeypatch):
    kernels = torch.ops.mkldnn
    monkeypatch.setattr(kernels, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(kernels, "_is_mkldnn_fp16_supported", lambda: False)
    assert half_products.slow() == ["float16"]
    monkeypatch.setattr(half_products, "_NATIVE", {"bfloat16": "_there_is_no_such_operator"})
    assert half_products.slow() == ["bfloat16"]

"""Statistics against the same sums in fp64."""

import logging

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.compress import statistics
from stages.compress.statistics import ColumnNorm, DeadInputs, Hessian, add_product
from stages.core.errors import Refusal
from stages.core.numbers import finite
from tests import families
from tests.hessians import ChosenHessian

pytestmark = [pytest.mark.numerics, pytest.mark.device]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tokens(dtype: torch.dtype, count: int = 200, features: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(features, features, generator=generator) / features**0.5
    return (torch.randn(count, features, generator=generator) @ mixed).to(families.DEVICE, dtype)


def sizes(monkeypatch: pytest.MonkeyPatch, **changed: int) -> None:
    """Change sizes of the CPU and of a card."""
    for name, size in changed.items():
        monkeypatch.setattr(statistics, name, size)
        monkeypatch.setattr(statistics, f"CARD_{name}", size)


def taken(kind, inputs: torch.Tensor, pieces: int = 1):
    """Take a statistic of inputs that are added in `pieces`."""
    statistic = kind(inputs.shape[1], inputs.device)
    for piece in inputs.chunk(pieces):
        statistic.add(piece)
    return statistic


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_norm_is_the_direct_one(dtype):
    inputs = tokens(dtype)
    direct = inputs.double().square().mean(0).sqrt()
    norm = taken(ColumnNorm, inputs).norm()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), direct, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hessian_is_the_direct_one(dtype):
    inputs = tokens(dtype)
    direct = 2 / len(inputs) * inputs.double().T @ inputs.double()
    matrix = taken(Hessian, inputs).matrix()
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.double(), direct, rtol=1e-5, atol=1e-6)


class Held(TorchDispatchMode):
    """Find the most bytes that tensors made by operations held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: each for key, each in self.held.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out


@pytest.mark.parametrize("descending", [False, True])
def test_a_factor_is_made_in_the_room_of_two(descending, monkeypatch):
    sizes(monkeypatch, LEAF_ROWS=32, STRIPE_ROWS=32)
    statistic = taken(Hessian, tokens(torch.float32, 512, 256))
    with Held() as memory:
        factor = statistic.inverse_factor(0.01, descending=descending)
    matrices = memory.most / factor.untyped_storage().nbytes()
    assert 2 <= matrices < 3.2  # the sum is one of them


@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_tokens_are_split_does_not_matter(kind, dtype, monkeypatch):
    inputs = tokens(dtype)
    whole, pieces = taken(kind, inputs), taken(kind, inputs, pieces=7)
    sizes(monkeypatch, CHUNK_TOKENS=13, STRIPE_ROWS=7)
    chunks = taken(kind, inputs)
    for other in (pieces, chunks):
        assert other.num_tokens == whole.num_tokens == len(inputs)
        read = (lambda s: s.norm()) if kind is ColumnNorm else (lambda s: s.matrix())
        torch.testing.assert_close(read(other), read(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factor_is_that_of_the_damped_inverse(dtype):
    inputs = tokens(dtype)
    statistic = taken(Hessian, inputs)
    upper = statistic.inverse_factor(0.01)
    damped = statistic.matrix().double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(len(damped), device=damped.device)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close((upper.T @ upper).double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-3)
    assert statistic.inverse_factor(0.01) is upper


def test_a_dead_feature_takes_no_part():
    inputs = tokens(torch.float32)
    inputs[:, 5] = 0
    statistic = taken(Hessian, inputs)
    assert statistic.dead().nonzero().flatten().tolist() == [5]
    upper = statistic.inverse_factor(0.01)
    assert (upper[5, 6:] == 0).all() and (upper[:5, 5] == 0).all()
    assert upper.isfinite().all()


def test_damping_serves_fewer_tokens_than_features():
    assert taken(Hessian, tokens(torch.float32, count=3)).inverse_factor(0.01).isfinite().all()


def test_a_hessian_that_is_not_positive_definite_is_refused(device):
    with pytest.raises(
        Refusal, match=r"Hessian of 2 features .* not positive definite with damping 0.01; raise"
    ):
        ChosenHessian(torch.tensor([[1.0, 3.0], [3.0, 1.0]], device=device)).inverse_factor(0.01)


@pytest.mark.parametrize("features", [1, 5, 24, 40])
def test_stripes_do_not_change_a_hessian_or_its_factor(features, monkeypatch):
    inputs = tokens(torch.float32, features=features)
    whole = taken(Hessian, inputs)
    sizes(monkeypatch, STRIPE_ROWS=3, LEAF_ROWS=3)
    striped = taken(Hessian, inputs)
    assert torch.equal(striped.matrix(), striped.matrix().T)
    torch.testing.assert_close(striped.matrix(), whole.matrix(), rtol=1e-5, atol=1e-6)
    damped = striped.matrix().double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(features, device=damped.device)
    upper = striped.inverse_factor(0.01)
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    torch.testing.assert_close((upper.T @ upper).double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_are_exact_and_the_precision_is_restored(dtype):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    inputs = torch.randint(-200, 200, (500, 16), generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(families.DEVICE, dtype)
    exact = inputs.double().T @ inputs.double() * 2 / 500
    torch.testing.assert_close(taken(Hessian, inputs).matrix().double(), exact, rtol=1e-6, atol=0)
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
def test_a_feature_that_is_zero_on_every_token_is_dead(kind):
    inputs = tokens(torch.bfloat16)
    inputs[:, [5, 9]] = 0
    inputs[7, 9] = 1e-3
    assert taken(kind, inputs, pieces=3).dead().nonzero().flatten().tolist() == [5]


def test_dead_inputs_are_logged_again_only_if_there_are_more(caplog):
    logging.disable(logging.NOTSET)
    dead = DeadInputs("left")
    with caplog.at_level(logging.INFO):
        for count in (0, 3, 3, 2, 3, 5, 0):
            dead.log("x", torch.arange(8) < count)
        dead.log("y", torch.arange(8) < 3)
    assert [record.message.partition(" input")[0] for record in caplog.records] == [
        "x: 3 of 8", "x: 5 of 8", "y: 3 of 8",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
@pytest.mark.parametrize("value", [1e30, float("nan"), float("-inf")])
def test_inputs_that_are_broken_or_too_large_to_square_do_not_go_unnoticed(value, kind):
    inputs = tokens(torch.float32)
    assert taken(kind, inputs).finite()
    inputs[0, 3] = value
    assert not taken(kind, inputs, pieces=3).finite()


def test_on_a_card_values_of_16_bits_are_multiplied_as_they_are(monkeypatch):
    """A CPU has no such product, so it is replaced by a slow one."""

    def mm(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        return (left.double() @ right.double()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    inputs, total = tokens(torch.bfloat16), torch.ones(24, 5, device=families.DEVICE)
    add_product(total, inputs, inputs[:, :5])
    exact = 1 + inputs.double().T @ inputs[:, :5].double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_broken_value_among_many_is_found(value, dtype, device):
    values = torch.randn(37, 41, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    assert finite(values) and finite(values[:0]) and finite(values.T)
    for position in (0, 700, 37 * 41 - 1):
        broken = values.clone()
        broken.view(-1)[position] = value
        assert not finite(broken) and not finite(broken.T)

"""The device, and the switches that make a run repeatable."""

import os

import pytest
import torch

from stages.core import half_products
from stages.core.errors import Refusal
from stages.core.run import MATRIX_UNITS, Run


def settings(**changed) -> Run:
    sound = {"device": "cpu", "dtype": "bfloat16", "threads": 1, "seed": 0, "numerics": "fast"}
    return Run(**(sound | changed))


def on_cards(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a machine with `count` GPUs, as far as torch can tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_the_device_asked_for_is_the_one_given(monkeypatch):
    assert settings().resolved_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings(device="auto").resolved_device() == torch.device("cpu")
    on_cards(2, monkeypatch)
    assert settings(device="auto").resolved_device() == torch.device("cuda")
    assert settings(device="cuda:1").resolved_device() == torch.device("cuda:1")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    for backend in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(Refusal, match=f"run.device is {device}, which this machine lacks; use cpu or auto"):
        settings(device=device).resolved_device()


@pytest.mark.parametrize("cards", [1, 2])
def test_a_card_beyond_the_last_is_refused(cards, monkeypatch):
    on_cards(cards, monkeypatch)
    last = f"cuda:{cards - 1}"
    assert settings(device=last).resolved_device() == torch.device(last)
    with pytest.raises(Refusal, match=f"run.device is cuda:{cards}, which this machine lacks"):
        settings(device=f"cuda:{cards}").resolved_device()


def test_every_switch_is_set():
    torch.set_deterministic_debug_mode("default")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    settings(seed=7).start()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == 1
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    first = torch.rand(3)
    settings(seed=7).start()
    assert torch.equal(torch.rand(3), first)


def test_on_cuda_attention_is_deterministic_and_sums_are_fp32(monkeypatch):
    on_cards(1, monkeypatch)
    wanted = {"flash": True, "mem_efficient": True, "math": True, "cudnn": False}
    matmul = torch.backends.cuda.matmul
    sums = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in wanted}
    reduced = {name: getattr(matmul, name) for name in sums}
    try:
        for kind, allowed in wanted.items():
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(not allowed)
        for name in sums:
            setattr(matmul, name, True)
        settings(device="cuda").start()
        for kind, allowed in wanted.items():
            assert getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() == allowed
        assert not any(getattr(matmul, name) for name in sums)
        assert torch.get_deterministic_debug_mode() == 2  # "error": kernels choose their deterministic form
    finally:
        for kind, allowed in before.items():
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(allowed)
        for name, allowed in reduced.items():
            setattr(matmul, name, allowed)


def test_portable_numerics_name_nothing_that_differs_between_processors(monkeypatch):
    fixed = settings(numerics="portable", dtype="float32", device="auto")
    on_cards(1, monkeypatch)
    assert fixed.resolved_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(MATRIX_UNITS, True))
    assert fixed.arithmetic() == {
        "device": "cpu", "numerics": "portable", "cpu_capability": "AVX2", "cpu_matrix_units": [],
        "threads": 1, "dtype": "float32", "torch": torch.__version__,
    }  # fmt: skip


def test_numerics_name_what_bytes_depend_on(monkeypatch):
    assert settings().arithmetic() == {
        "device": "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_matrix_units": [unit for unit in MATRIX_UNITS if torch.cpu.get_capabilities()[unit]],
        "cpu_products_in_fp32": half_products.slow(),
        "threads": 1,
        "dtype": "bfloat16",
        "torch": torch.__version__,
    }
    on_cards(2, monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    assert settings(device="cuda:1").arithmetic()["device"] == "GPU at cuda:1"

"""The device, the number type, and every switch that decides the bits of a result.

Equal inputs give equal bytes on one machine: threads, seeds and determinism are set here and nowhere else.
The device is recorded with every artifact and is no dependency, so a model may be made on a GPU and used on a
CPU.
"""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stages.core import half_products, portable
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Seed, Strict


def _device(value: str) -> str:
    if value == "auto":
        return value
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d{1,2})?", value):
        raise ValueError("allowed: auto, cpu, cuda, cuda:<index>, mps or xpu")
    return value


MATRIX_UNITS = ("amx_bf16", "amx_fp16", "avx512_bf16", "avx512_fp16")
"""The instructions by which torch chooses its kernels for products of bf16 or fp16 values."""
Dtype = Literal["bfloat16", "float16", "float32"]


class Run(Strict):
    """Section `run` of params.yaml."""

    device: Annotated[str, AfterValidator(_device)]
    """Where tensors live; `auto` takes CUDA if this machine has it. Recorded, not a dependency."""
    dtype: Dtype
    """The dtype models are loaded, computed and written in."""
    threads: Annotated[int, Field(ge=1, le=1024)]
    """CPU threads of each stage."""
    seed: Seed
    """Seeds every random draw that a recipe does not seed itself."""
    numerics: Literal["fast", "portable"]
    """`portable`: fp32 and fixed kernels on the CPU, so that bytes agree between processors
    (`stages.core.portable`)."""

    @model_validator(mode="after")
    def _portable(self) -> Self:
        if self.numerics == "portable" and (self.dtype != "float32" or self.device not in ("auto", "cpu")):
            raise ValueError(
                f"numerics portable needs dtype float32 and device cpu or auto, not {self.dtype} "
                f"and {self.device}"
            )
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def resolved_device(self) -> torch.device:
        """Return the device to compute on.

        Raises:
            Refusal: this machine has no such device.
        """
        if self.numerics == "portable":
            return torch.device("cpu")
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        if device.type != "cpu":
            backend = getattr(torch, device.type, None) or getattr(torch.backends, device.type, None)
            missing = backend is None or not backend.is_available()
            if missing or (device.index or 0) >= getattr(backend, "device_count", lambda: 1)():
                raise Refusal(f"run.device is {self.device}, which this machine lacks; use cpu or auto.")
        return device

    def start(self) -> torch.device:
        """Fix threads, seeds and every switch that changes results; return the device.

        Raises:
            Refusal: this machine lacks the device, or ignores the switches of `numerics: portable`.
        """
        from stages.core.memory import keep_freed

        if self.numerics == "portable" and (ignored := portable.ignored_switch()):
            raise Refusal(
                f"run.numerics is portable, but here a switch does not work: {ignored}; use numerics: fast, "
                "or a processor of Intel with AVX2."
            )
        keep_freed()
        half_products.widen(self._widened())
        # cuBLAS reads this when it starts: without it deterministic algorithms are refused on CUDA.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device = self.resolved_device()
        torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        # The same switch as use_deterministic_algorithms, which also imports the compiler: a second a stage.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        if device.type == "cuda":
            if device.index is not None:
                torch.cuda.set_device(device)  # Triton launches there, whatever card tensors are on
            _fix_sums()
            _choose_attention()
        return device

    def _widened(self) -> list[str]:
        """Return the dtypes whose products are computed in fp32 here: both of 16 bits, if portable."""
        return half_products.HALVES if self.numerics == "portable" else half_products.slow()

    def arithmetic(self) -> dict[str, Any]:
        """Return what the bytes of an artifact depend on beside its inputs.

        It is constant on one machine; with `numerics: portable`, on all that honour its switches.
        """
        device = self.resolved_device()
        fixed = self.numerics == "portable"
        card = {"kernels": _kernels()} if device.type == "cuda" else {}
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            **card,
            **({"numerics": self.numerics} if fixed else {}),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_matrix_units": [
                flag for flag in MATRIX_UNITS if torch.cpu.get_capabilities().get(flag) and not fixed
            ],
            **({} if fixed else {"cpu_products_in_fp32": self._widened()}),
            "threads": self.threads,
            "dtype": self.dtype,
            "torch": str(torch.__version__),
        }


def _kernels() -> str | None:
    """Return the version of Triton, which compiles kernels; None without it or a C compiler."""
    compiler = os.getenv("CC") or shutil.which("gcc") or shutil.which("clang")
    return version("triton") if compiler and find_spec("triton") else None


def _fix_sums() -> None:
    """Sum the products of bf16 and fp16 values in fp32 throughout, also where a sum is split into parts."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _choose_attention() -> None:
    """Allow the kernels of attention that are deterministic in both directions.

    Flash attention takes calls without a mask, the memory-efficient kernel those with one, and what neither
    takes is computed step by step ("math"). Forward, each sums in a fixed order. Backward, the first
    two add in the order in which parts finish, unless deterministic algorithms are required, as in
    `Run.start`: then they fix the order. cuDNN's kernel does not promise that.
    """
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(False)

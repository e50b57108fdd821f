"""The most that a machine can do: products, copies, reading, writing; and the work that a block asks for."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig

THREADS = (1, 4, 16)
"""Readers and writers that are tried."""


@dataclass(frozen=True)
class Limits:
    """Rates of this machine: products a second times two, and bytes a second."""

    bf16_flops: float
    fp32_flops: float
    copy_bytes: float
    """Within the device; read and written bytes count once."""
    upload_bytes: float
    download_bytes: float
    read_bytes: float
    """From a file that the system holds in memory, by the best number of `THREADS`."""
    write_bytes: float
    """To a new file, not flushed to the disk."""


def measure(device: torch.device, folder: Path, size: int, side: int = 8192) -> Limits:
    """Measure the limits of a device and of the disk under `folder`.

    Args:
        size: bytes of the file that is written and read, and of the tensor that is copied.
        side: of the square matrices that are multiplied.
    """
    bf16, fp32 = (_product(device, side, dtype) for dtype in (torch.bfloat16, torch.float32))
    on_host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_device = torch.zeros(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(on_device)
    copy, upload, download = (
        size / _fastest(work, device)
        for work in (
            lambda: other.copy_(on_device),
            lambda: on_device.copy_(on_host, non_blocking=True),
            lambda: on_host.copy_(on_device, non_blocking=True),
        )
    )
    write, read = _disk(folder, size)
    return Limits(bf16, fp32, copy, upload, download, read, write)


def _product(device: torch.device, side: int, dtype: torch.dtype) -> float:
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(left)
    return 2 * side**3 / _fastest(lambda: torch.mm(left, right, out=out), device)


def _fastest(work: Callable[[], object], device: torch.device, repeats: int = 4) -> float:
    """Return the seconds of the fastest of some calls; the first warms up."""
    best = float("inf")
    for number in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def _disk(folder: Path, size: int) -> tuple[float, float]:
    """Return the bytes a second that are written to a new file and read from it, with the best threads."""
    content, file = memoryview(bytearray(os.urandom(2**20) * (size // 2**20 + 1)))[:size], folder / "limit"
    written, read = 0.0, 0.0
    for threads in THREADS:
        step = -(-size // threads)
        starts = range(0, size, step)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        write = partial(_write, descriptor, content, step)
        load = partial(_read, descriptor, content, step)
        try:
            with ThreadPoolExecutor(threads) as pool:
                written = max(written, size / _seconds(lambda: list(pool.map(write, starts))))  # noqa: B023
                read = max(read, size / _seconds(lambda: list(pool.map(load, starts))))  # noqa: B023
        finally:
            os.close(descriptor)
            file.unlink()
    return written, read


def _write(descriptor: int, content: memoryview, step: int, start: int) -> None:
    os.pwrite(descriptor, content[start : start + step], start)


def _read(descriptor: int, content: memoryview, step: int, start: int) -> None:
    os.preadv(descriptor, [content[start : start + step]], start)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class BlockWork:
    """The floating-point operations and bytes of a Llama block for so many calibration tokens."""

    bytes: int
    forward: float
    """Of the linears and of causal attention."""
    hessians: float
    """Of the four inputs of its linears, one half of each symmetric matrix."""
    factors: float
    """Cholesky, inverse, Cholesky of each Hessian."""
    updates: float
    """Of the columns still to come, once a column is settled."""

    @classmethod
    def of(cls, config: LlamaConfig, samples: int, length: int) -> "BlockWork":
        """Count the work on `samples` windows of `length` tokens."""
        hidden, wide = config.hidden_size, config.intermediate_size
        key = config.num_key_value_heads * config.head_dim
        inputs = {hidden: 2 * hidden + 2 * key + 2 * wide, wide: hidden}
        """Output features by input width; the output projection reads as many as q, k and v."""
        weights, tokens = sum(width * out for width, out in inputs.items()), samples * length
        widths = [hidden, hidden, hidden, wide]
        return cls(
            bytes=2 * weights,
            forward=tokens * (2.0 * weights + 2 * length * hidden),
            hessians=float(tokens * sum(width**2 for width in widths)),
            factors=4 / 3 * sum(width**3 for width in widths),
            updates=float(sum(out * width**2 for width, out in inputs.items())),
        )

    def seconds(self, limits: Limits, *, forward: bool, hessians: bool) -> float:
        """Return the least time for a block whose bytes are in memory: up, all work, down, one by another."""
        moved = self.bytes * (1 / limits.upload_bytes + 1 / limits.download_bytes + 1 / limits.copy_bytes)
        moved += forward * self.forward / limits.bf16_flops
        if hessians:
            moved += self.hessians / limits.bf16_flops + (self.factors + self.updates) / limits.fp32_flops
        return moved

    def disk_seconds(self, limits: Limits) -> float:
        """Return the time to read and to write the block's bytes."""
        return self.bytes * (1 / limits.read_bytes + 1 / limits.write_bytes)

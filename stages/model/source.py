"""A source that may be larger than memory: its blocks have weights only while they are worked on.

All modules exist from the start, on the meta device, where parameters take no memory. A block's parameters
are read from the checkpoint's safetensors on request and dropped afterwards. Each read reopens its
file, because the mapped pages of an open file count as used memory.

While a block is worked on, threads read the next into the CPU's memory (page-locked memory if the device is
CUDA, which copies from it at full speed). The device holds the weights of a single block.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import safe_open

from stages.core import memory
from stages.core.files import MODELS
from stages.core.lazy import importing, torch
from stages.core.numbers import check_finite
from stages.core.reading import reading
from stages.model.artifact import (
    attention,
    load_config,
    load_model,
    load_tokenizer,
    misshapen,
    never_rescale,
)
from stages.model.blocks import blocks
from stages.model.grid import Quantized
from stages.model.names import check_names, naming
from stages.model.packed import code_from, scheme_of, weight_from

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.core.run import Run

log = logging.getLogger(__name__)

READERS = {"cpu": 1, "cuda": 4}
"""Threads that read ahead, by the type of device. On a CPU they share its cores with the arithmetic."""
Read: TypeAlias = "Callable[[str], Tensor]"
"""Reads a tensor by its full name in the model."""


def load_source(artifact: str, run: Run) -> PreTrainedModel:
    """Load a whole source in plain weights, for methods that cannot work block by block.

    Raises:
        Refusal: some weights are NaN or infinite.
    """
    model = load_model(artifact, run, dequantize=True)
    check_finite(artifact, model.named_parameters())
    return model


class Files:
    """The parameters of a model, read from its safetensors on request; no file stays open.

    Tensors have their names in the model, whatever the files call them (`stages.model.names`). Packed weights
    are dequantized as they are read.

    Args:
        artifact: `<stage>/<recipe>`.
        scheme: how packed weights are stored, None if there are none; see `stages.model.packed`.

    Raises:
        Unreadable: a file cannot be read, now or when a tensor is requested.
    """

    def __init__(self, artifact: str, model: PreTrainedModel, scheme: Mapping[str, Any] | None) -> None:
        in_model = naming(model)
        self._name, self._scheme = artifact, scheme
        self._where: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, list[int]] = {}
        self._parts: dict[str, list[str]] = {}
        for file in sorted((MODELS / artifact).glob("*.safetensors")):
            with reading(artifact), safe_open(file, "pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    name, converted = in_model(key)
                    shape = [] if converted else handle.get_slice(key).get_shape()
                    self._where[name], self._shapes[name] = (file, key), shape
        for name in self._where:
            head, _, leaf = name.rpartition(".")
            self._parts.setdefault(f"{head}.{leaf.split('_')[0]}", []).append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._where or self._packed(name)

    def holds(self, name: str, shape: torch.Size) -> bool:
        """Tell whether the files have the parameter `name` in this shape, as one tensor or packed."""
        return self._packed(name) or self._shapes.get(name) == list(shape)

    def read(self, name: str) -> Tensor:
        """Read a parameter by its name in the model."""
        parts = self._parts[name] if self._packed(name) else [name]
        with reading(self._name):
            return weight_from({part: self._tensor(part) for part in parts}, name, self._scheme)

    def code(self, name: str) -> Quantized | None:
        """Read the codes of a parameter; None if it is stored dense."""
        if self._scheme is None or not self._packed(name):
            return None
        with reading(self._name):
            return code_from({part: self._tensor(part) for part in self._parts[name]}, name, self._scheme)

    def _packed(self, name: str) -> bool:
        return self._scheme is not None and f"{name}_scale" in self._where

    def _tensor(self, name: str) -> Tensor:
        file, key = self._where[name]
        with safe_open(file, "pt") as handle:
            tensor: Tensor = handle.get_tensor(key)
        return tensor


class Loaded:
    """The parameters of a model whose files store them differently; `load` gives all at the first read."""

    def __init__(self, names: Iterable[str], load: Callable[[], PreTrainedModel]) -> None:
        self._names, self._load, self._lock = set(names), load, Lock()
        self._tensors: Mapping[str, Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> Tensor:
        """Return a copy of the parameter of this name."""
        with self._lock:
            if self._tensors is None:
                self._tensors = self._load().state_dict()
        return self._tensors[name].clone()


class Empty:
    """A model on the meta device whose blocks have weights only within `block`; nothing is written.

    By itself it lets a method look at the source before it begins; `Streamed` derives from it.
    """

    def __init__(self, artifact: str, run: Run) -> None:
        with importing():
            from accelerate import init_empty_weights  # type: ignore[import-untyped]
            from transformers import AutoModelForCausalLM

        self.name, self._run = artifact, run
        config = load_config(artifact)
        scheme = scheme_of(config)
        config.__dict__.pop("quantization_config", None)
        memory.keep_freed(below=memory.SMALL, trim=memory.SMALL)
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=run.torch_dtype, attn_implementation=attention(config)
            ).eval()
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        if size <= memory.LARGE:
            memory.keep_freed()
        self.model.tie_weights()
        check_names(artifact, self.model)
        never_rescale(self.model)
        files = Files(artifact, self.model, scheme)
        self._source: Files | Loaded = files
        if others := [n for n, p in self.model.named_parameters() if not files.holds(n, p.shape)]:
            log.info(
                "%s: its files store %d parameters (%s) differently from the model, so it is loaded whole",
                artifact, len(others), ", ".join(others[:3]),
            )  # fmt: skip
            in_cpu = run.model_copy(update={"device": "cpu"})  # a card holds one block of it, as of any other
            self._source = Loaded(self.model.state_dict(), lambda: load_source(artifact, in_cpu))
        self._device, self._dtype = run.resolved_device(), run.torch_dtype
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self._device)
        self._blocks = blocks(self.model)
        self._readers = ThreadPoolExecutor(READERS.get(self._device.type, 1), "reader")
        self._ahead: tuple[tuple[str, bool], dict[str, Future[Tensor]]] | None = None
        """The block that is read ahead, and whether dense; its tensors by full name."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's tokenizer."""
        return load_tokenizer(self.name)

    def whole(self) -> PreTrainedModel:
        """Load the whole source; it takes memory only while the caller keeps it."""
        return load_source(self.name, self._run)

    def bring_rest(self) -> None:
        """Load what text passes through outside the blocks: embeddings, norms; never the output head.

        The first block drops the embeddings, a large part of a small model and gigabytes of a card. So call
        this before each pass of text.
        """
        for name, module in self._outside():
            self._fill(name, module, self._request(name, module, self._source.read, recurse=False))
        self.model.tie_weights()

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules outside the blocks that text passes through, by full name."""
        body: Any = self.model.base_model
        inside = {id(module) for _, block in self._blocks for module in block.modules()}
        names = {id(module): name for name, module in self.model.named_modules()}
        return ((names[id(module)], module) for module in body.modules() if id(module) not in inside)

    def _drop_embeddings(self) -> None:
        """Free the embeddings, which no model reads once text has reached its first block."""
        embeddings = [module for _, module in self._outside() if isinstance(module, torch.nn.Embedding)]
        if any(not parameter.is_meta for module in embeddings for parameter in module.parameters()):
            for module in embeddings:
                self._drop(module)
            self.model.tie_weights()  # or a tied head would keep its weight

    @contextmanager
    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        """Hold the source's weights of the block; see `stages.compress.home.Home`."""
        self._bring(name, block, dense=True)
        try:
            yield False
        finally:
            self._drop(block)

    def _bring(self, name: str, block: nn.Module, *, dense: bool) -> None:
        """Fill a block, from where it was read ahead if it was, and begin to read the next.

        Args:
            dense: see `_reader`.
        """
        if name == self._blocks[0][0]:
            self._drop_embeddings()
        if self._ahead is None or self._ahead[0] != (name, dense):
            self._ahead = (name, dense), self._request(name, block, self._reader(name, dense))
        tensors = self._ahead[1]
        self._ahead = None
        self._fill(name, block, tensors)
        names = [name for name, _ in self._blocks]
        for following, module in self._blocks[names.index(name) + 1 :][:1]:
            requested = self._request(following, module, self._reader(following, dense))
            self._ahead = (following, dense), requested

    def _reader(self, name: str, dense: bool) -> Read:
        """Return how a block's tensors are read.

        Args:
            dense: from the source even if the block is finished.
        """
        return self._source.read

    def _request(
        self, prefix: str, module: nn.Module, read: Read, *, recurse: bool = True
    ) -> dict[str, Future[Tensor]]:
        """Begin to read the parameters and the stored buffers of a module, by its full name `prefix`."""
        requested = {}
        for name, _ in module.named_parameters(prefix, recurse=recurse):
            requested[name] = self._readers.submit(self._fetch, read, name, self._dtype)
        for name, _ in module.named_buffers(prefix, recurse=recurse):
            if name in self._source:
                requested[name] = self._readers.submit(self._fetch, read, name, None)
        return requested

    def _fetch(self, read: Read, name: str, dtype: torch.dtype | None) -> Tensor:
        """Read a tensor into the CPU's memory, in `dtype` if it is given."""
        tensor = read(name).to(dtype=dtype)
        if self._device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory()
        # A mapped file is read when it is touched.
        tensor.flatten()[:: mmap.PAGESIZE // tensor.element_size()].any()
        return tensor

    def _fill(self, prefix: str, module: nn.Module, tensors: Mapping[str, Future[Tensor]]) -> None:
        """Give a module its parameters and stored buffers, by full name."""
        buffers = dict(module.named_buffers(prefix))
        for full, requested in tensors.items():
            name, tensor = full.removeprefix(f"{prefix}."), requested.result()
            if full in buffers:
                buffers[full].copy_(tensor)
                continue
            shape = module.get_parameter(name).shape
            if tensor.shape != shape:
                raise misshapen(self.name, [(full, tensor.shape, shape)])
            set_parameter(module, name, tensor.to(self._device, non_blocking=True))
        check_finite(self.name, ((full, p) for full, p in module.named_parameters(prefix) if full in tensors))

    def _drop(self, module: nn.Module) -> None:
        """Free the parameters of a module."""
        for name, parameter in list(module.named_parameters()):
            set_parameter(module, name, torch.empty_like(parameter, device="meta"))


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter of a module or of one inside it, without gradients."""
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)

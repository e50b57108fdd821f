"""A source that is larger than memory: its blocks have weights only while somebody looks at them.

The modules are all there from the start, on the meta device, where parameters take no memory. A block's are
read from the checkpoint's safetensors when asked for and given up again after. A file is opened anew for
every tensor, as pages of an open one count as memory in use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from stages.core.artifact import MODELS, load_model
from stages.core.blocks import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.core.run import Run


class Files:
    """The parameters of a model in a plain safetensors checkpoint, read when asked for; no file stays open.

    Some families name a tensor otherwise on disk than in the model (GPT-NeoX's `embed_out`).
    """

    def __init__(self, folder: Path, model: "PreTrainedModel") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        renamings = get_model_conversion_mapping(model)
        self._where: dict[str, tuple[Path, str]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    name = key
                    for renaming in renamings:
                        name, _ = renaming.rename_source_key(name)
                    self._where[name] = (file, key)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """The parameter of this name."""
        file, key = self._where[name]
        with safe_open(file, "pt") as handle:
            tensor: Tensor = handle.get_tensor(key)
        return tensor


class Loaded:
    """The same of a model in memory; for sources whose plain weights no file holds as they are."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = model.state_dict()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> Tensor:
        """A copy of the parameter of this name."""
        return self._tensors[name].clone()


class Empty:
    """A model whose blocks are without weights except while `block` holds them; nothing is written.

    `model` has its parameters on the meta device. The base of `Streamed`; by itself, it is how a method
    looks at the source before it begins.
    """

    def __init__(self, artifact: str, run: "Run") -> None:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]
        from transformers import AutoConfig, AutoModelForCausalLM

        self.name, self._run = artifact, run
        config: Any = AutoConfig.from_pretrained(MODELS / artifact, local_files_only=True)
        packed = config.__dict__.pop("quantization_config", None)
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=run.torch_dtype, attn_implementation="sdpa"
            ).eval()
        self.model.tie_weights()
        self._source: Files | Loaded = Files(MODELS / artifact, self.model)
        if packed or any(name not in self._source for name, _ in self.model.named_parameters()):
            self._source = Loaded(self.whole())
        self._device, self._dtype = run.resolved_device(), run.torch_dtype
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self._device)
        self._blocks = blocks(self.model)

    def whole(self) -> "PreTrainedModel":
        """The source all in memory, for what cannot be done a block at a time."""
        return load_model(self.name, self._run, dequantize=True)

    def bring_rest(self) -> None:
        """Load what text passes through on its way to and from the blocks: embeddings, norms."""
        body: Any = self.model.base_model
        inside = {id(module) for _, block in self._blocks for module in block.modules()}
        names = {id(module): name for name, module in self.model.named_modules()}
        for module in body.modules():
            if id(module) not in inside:
                self._fill(names[id(module)], module, recurse=False)
        self.model.tie_weights()

    @contextmanager
    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        """Hold the source's weights of the block; see `stages.core.walk.Home`."""
        self._fill(name, block)
        try:
            yield False
        finally:
            self._drop(block)

    def _fill(self, prefix: str, module: nn.Module, *, recurse: bool = True) -> None:
        for name in [name for name, _ in module.named_parameters(recurse=recurse)]:
            tensor = self._source.read(f"{prefix}.{name}".lstrip("."))
            put(module, name, tensor.to(self._device, self._dtype))
        for name, buffer in module.named_buffers(recurse=recurse):
            if (full := f"{prefix}.{name}".lstrip(".")) in self._source:
                buffer.copy_(self._source.read(full))

    def _drop(self, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters()):
            put(module, name, torch.empty_like(parameter, device="meta"))


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

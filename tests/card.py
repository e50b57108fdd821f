"""A card that is not there: CPU memory that torch takes for another device's.

Code that mixes devices, or moves to the card only some of what it needs, fails on the card alone. Here each
tensor on `CARD` holds a CPU tensor, and an operation raises what CUDA would: where it is handed tensors of
both devices, where a CPU's generator is to draw on the card, and where CUDA has no deterministic kernel. So
a machine without a card finds such faults. What it cannot show is arithmetic: kernels are the CPU's.

torch lets a program register a device of its own ("PrivateUse1"), once a process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from stages.core.run import Run

NAME = "card"
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
"""Operations on the card that take indices from the CPU."""
COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
SCALARS = {"masked_fill", "masked_fill_", "fill_", "where", "index_fill", "index_fill_"}
"""Operations that take a single number from the CPU, beside those that work entry by entry."""
NO_DETERMINISTIC_KERNEL = {
    "histc", "put_", "nll_loss2d_forward", "nll_loss2d_backward", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "adaptive_avg_pool2d_backward", "_adaptive_avg_pool2d_backward",
    "avg_pool3d_backward", "max_pool3d_with_indices_backward", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "grid_sampler_2d_backward",
    "_ctc_loss_backward", "max_unpool2d", "max_unpool3d", "kthvalue",
}  # fmt: skip
"""Operations that `torch.use_deterministic_algorithms` makes raise on CUDA, whatever their arguments."""


class Misplaced(AssertionError):
    """An operation that a card would refuse."""


class OnCard(torch.Tensor):
    """A tensor on the card; `held` has its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        tensor: OnCard = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())

    @property
    def data(self) -> torch.Tensor:
        """The tensor without its graph; a new one replaces the values too."""
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if not isinstance(new, OnCard):
            raise Misplaced("data of a tensor on the card is set to a tensor elsewhere")
        torch.Tensor.data.__set__(self, new)
        self.held = new.held

    def tolist(self) -> Any:
        """Return the values as Python numbers."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory of the values, by which shared weights are recognized."""
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        """Return the address of the values."""
        return self.held.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.held})"

    def __format__(self, how: str) -> str:
        return self.held.detach().__format__(how)


class _Watch(TorchDispatchMode):
    """Hands every operation to `_run`, those that create tensors as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.counts)


def _run(func: Any, args: Any, kwargs: dict[str, Any], counts: Counter[str]) -> Any:
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    on_card = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    asked = kwargs.get("device")
    onto = bool(on_card) if asked is None else torch.device(asked).type == NAME
    if on_card or onto:
        _check(func, args, kwargs, tensors, on_card)
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" or (on_card and not onto and name == "_to_copy"):
            counts["waits"] += 1
        if onto and torch.Tag.nondeterministic_seeded in func.tags:
            counts["draws"] += 1
    options = {**kwargs, "device": "cpu"} if asked is not None and onto else kwargs
    out = func(*pytree.tree_map(_held, args), **pytree.tree_map(_held, options))
    written = _written(func, args, kwargs)
    return written if written is not None else pytree.tree_map(_placed, out) if onto else out


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the arguments that an operation writes to and returns; None if it returns new tensors."""
    schema = func._schema
    values = {
        **{argument.name: value for argument, value in zip(schema.arguments, args, strict=False)},
        **kwargs,
    }
    changed = [
        values.get(each.name) for each in schema.arguments if each.alias_info and each.alias_info.is_write
    ]
    returned = [each for each in schema.returns if each.alias_info and each.alias_info.is_write]
    if not returned:
        return None
    return changed[0] if len(returned) == 1 else tuple(changed[: len(returned)])


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnCard) else value


def _placed(value: Any) -> Any:
    return OnCard(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnCard) else value


def _check(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], on_card: list[OnCard]) -> None:
    """Raise what CUDA would raise."""
    name = func.overloadpacket.__name__
    if kwargs.get("generator") is not None:
        raise Misplaced(f"{func} draws on the card from a generator of the CPU")
    weighed = name == "bincount" and (len(args) > 1 or kwargs.get("weights") is not None)
    ranked = name == "median" and func._overloadname == "dim"
    if name in NO_DETERMINISTIC_KERNEL or weighed or ranked:
        raise Misplaced(f"{func} has no deterministic kernel on CUDA")
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnCard)]
    if not elsewhere or not on_card or name in COPIES:
        return
    if name in INDEXED and isinstance(args[0], OnCard):
        return
    together = name.startswith(("_foreach", "_fused"))
    by_entry = (torch.Tag.pointwise in func.tags or name in SCALARS) and not together
    if by_entry and all(tensor.ndim == 0 for tensor in elsewhere):
        return
    shapes = [f"{'card' if isinstance(t, OnCard) else t.device} {list(t.shape)}" for t in tensors]
    raise Misplaced(f"{func} is handed tensors of two devices: {', '.join(shapes[:8])}")


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch expects of a device's module; a seed of the card is the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Checkpointed activations ask for it wherever a second device is registered."""
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: kernels are the CPU's."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """Return a state without meaning."""
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Any, device: Any = None) -> None:
        """Do nothing."""

    def device(self, number: Any) -> Any:
        """Return a context in which the card is current, as it always is."""
        return nullcontext()


class _Hook(backend_registration._DummyPrivateUse1Hook):  # type: ignore[misc]
    """Tells libraries that look for an accelerator that there is none."""

    def is_available(self) -> bool:
        return False


_KERNELS = torch.library.Library("aten", "IMPL")


def _register() -> torch.device:
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
        # Without a kernel of its own, torch computes this of smaller steps that round differently.
        _KERNELS.impl("silu_backward", torch.ops.aten.silu_backward, "PrivateUse1")
    return torch.device(NAME, 0)


def _moved(model: PreTrainedModel, *where: Any, **options: Any) -> PreTrainedModel:
    """Move a model and tie its weights again, which stay tied on the way to a device of torch's own."""
    torch.nn.Module.to(model, *where, **options)
    model.tie_weights()
    return model


@contextmanager
def pretended() -> Iterator[Counter[str]]:
    """Compute on the card, whatever device params name; yield counts of `waits` for it and `draws` on it."""
    device = _register()
    watch = _Watch()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device) passes by the watch
    try:
        with (
            mock.patch.object(Run, "resolved_device", lambda self: device),
            mock.patch.object(PreTrainedModel, "to", _moved),
            torch.autograd.set_multithreading_enabled(False),  # its threads may be older than the device
            watch,
        ):
            yield watch.counts
    finally:
        torch._C._set_only_lift_cpu_tensors(False)

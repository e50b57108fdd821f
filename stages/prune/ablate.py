"""Watching a decoder's residual stream, and running it with some of its blocks left out.

A block reads the stream and adds to it: x -> x + f(x). `observe` shows every block's x and x + f(x), or
those of its attention. `Ablation` runs the model's own forward with some f left out, by standing in for a
block's forward. Many sets of blocks left out share how they begin: they are run in such an order that a
run starts from the block where it first differs from the run before, whose stream is kept.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.core.blocks import blocks, check_length, forward
from stages.core.errors import Refusal
from stages.prune.remove import attention_of, output_projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Target = Literal["block", "attention"]
"""What is removed: whole blocks, or their attention."""
See = Callable[[int, Tensor, Tensor], None]
"""(block number, the stream before it, the stream after it), both `[windows, tokens, hidden]`."""


@dataclass(frozen=True)
class Rows:
    """Token ids `[rows, tokens]`, and which of them are predicted from those before, bool of that shape."""

    tokens: Tensor
    predicted: Tensor

    @classmethod
    def of(cls, windows: Tensor) -> "Rows":
        """Running text: every token of a window but its first is predicted."""
        predicted = torch.ones_like(windows, dtype=torch.bool)
        predicted[:, 0] = False
        return cls(windows, predicted)


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def observe(
    model: "PreTrainedModel", windows: Tensor, batch_size: int, target: Target, see: See, label: str
) -> None:
    """Call `see` for every block and every `batch_size` windows of one forward.

    Raises:
        Refusal: NaN or infinite hidden states, or windows longer than the model reads.
    """
    check_length(model, windows, label)

    names = [name for name, _ in blocks(model)]

    def checked(number: int, before: Tensor, after: Tensor) -> None:
        if not after.isfinite().all():
            raise Refusal(
                f"{label}: NaN or infinite hidden states after {names[number]}; nothing was written."
            )
        see(number, before, after)

    with ExitStack() as hooks:
        for number, (name, block) in enumerate(blocks(model)):
            attention = attention_of(name, block) if target == "attention" else None
            _watch(number, block, attention, checked, hooks)
        for batch in tqdm(windows.split(batch_size), desc=label, unit="batch"):
            forward(model, batch)


def _watch(number: int, block: nn.Module, attention: nn.Module | None, see: See, hooks: ExitStack) -> None:
    """Hooks on one block. What an attention adds is its output, or that of a norm it is handed to."""
    held: dict[str, Tensor] = {}

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        held["stream"] = stream_of(args, kwargs)

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        see(number, held["stream"], held["stream"] + held["added"] if attention else _first(output))
        held.clear()

    def attend(_: nn.Module, __: Any, output: Any) -> None:
        held["added"] = _first(output)

    def follow(_: nn.Module, args: Any, output: Any) -> None:
        if args and args[0] is held.get("added"):
            held["added"] = output

    hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
    hooks.enter_context(block.register_forward_hook(leave))
    for child in block.children() if attention else ():
        hooks.enter_context(child.register_forward_hook(attend if child is attention else follow))


class Ablation:
    """A model and the text on which runs of it with some blocks left out are compared.

    Raises:
        Refusal: a family whose blocks do not simply hand each other the stream, or rows it cannot read.
    """

    def __init__(
        self, model: "PreTrainedModel", rows: Rows, batch_size: int, target: Target, label: str
    ) -> None:
        check_length(model, rows.tokens, label)
        self._model, self._rows, self._batch_size, self._label = model, rows, batch_size, label
        self._target = target
        self._blocks = [block for _, block in blocks(model)]
        self._projections = output_projections(model) if target == "attention" else []
        self._out: frozenset[int] = frozenset()
        self._start = 0
        self._streams: list[Tensor] = [torch.empty(0)] * len(self._blocks)
        self._width = _chain(model)

    def likelihoods(self, sets: Iterable[frozenset[int]]) -> dict[frozenset[int], Tensor]:
        """For each set of blocks left out, the log-likelihood of the predicted tokens of each row, fp64.

        Raises:
            Refusal: one is not a number.
        """
        wanted = sorted(set(sets), key=lambda out: [number in out for number in range(len(self._blocks))])
        found: dict[frozenset[int], list[Tensor]] = {out: [] for out in wanted}
        parts = torch.arange(len(self._rows.tokens)).split(self._batch_size)
        with (
            ExitStack() as stand_ins,
            torch.no_grad(),
            tqdm(total=len(parts) * len(wanted), desc=self._label, unit="forward") as bar,
        ):
            self._stand_in(stand_ins)
            for part in parts:
                before: frozenset[int] | None = None
                for out in wanted:
                    self._out, self._start = out, 0 if before is None else min(out ^ before)
                    found[out].append(self._score(part))
                    before = out
                    bar.update()
        made = {out: torch.cat(values) for out, values in found.items()}
        for out, values in made.items():
            if not values.isfinite().all():
                raise Refusal(
                    f"{self._label}: without {sorted(out)} the model's predictions are NaN or infinite; "
                    "nothing was written."
                )
        return made

    def losses(self, sets: Iterable[frozenset[int]]) -> dict[frozenset[int], float]:
        """For each set of blocks left out, the mean loss in nats a predicted token."""
        return {out: self.loss(values) for out, values in self.likelihoods(sets).items()}

    def loss(self, likelihoods: Tensor) -> float:
        """The mean loss in nats a predicted token, from `[rows]` log-likelihoods."""
        return -float(likelihoods.sum()) / int(self._rows.predicted.sum())

    def _score(self, part: Tensor) -> Tensor:
        model: Any = self._model
        tokens, predicted = self._rows.tokens[part], self._rows.predicted[part, 1:]
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1].cpu()[predicted]
        each = torch.zeros(predicted.shape, dtype=torch.float64)
        chosen = logits.float().log_softmax(-1).gather(1, tokens[:, 1:][predicted][:, None])
        each[predicted] = chosen[:, 0].double()
        return each.sum(1)

    def _stand_in(self, stack: ExitStack) -> None:
        for number, block in enumerate(self._blocks):
            stack.callback(delattr, block, "forward")
            block.forward = self._block(number, block.forward)
        for number, one in enumerate(self._projections):
            stack.callback(delattr, one.module, "forward")
            one.module.forward = self._projection(number, one.module.forward)

    def _block(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """The block, or its input where it is left out; before the start nothing that matters."""

        def step(*args: Any, **kwargs: Any) -> Any:
            stream = stream_of(args, kwargs)
            if number >= self._start:
                stream = self._streams[number] if 0 < number == self._start else stream
                self._streams[number] = stream
                if not (number in self._out and self._target == "block"):
                    if args:
                        return original(stream, *args[1:], **kwargs)
                    return original(**{**kwargs, "hidden_states": stream})
            return stream if self._width is None else (stream, *[None] * (self._width - 1))

        return step

    def _projection(self, number: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def step(inputs: Tensor) -> Tensor:
            output = original(inputs)
            return torch.zeros_like(output) if number in self._out else output

        return step


def _chain(model: "PreTrainedModel") -> int | None:
    """How many values a block returns, None for a bare tensor.

    Raises:
        Refusal: some block is handed another tensor than the one before it returned.
    """
    outputs: list[Any] = []
    inputs: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(stream_of(args, kwargs))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)

    with ExitStack() as hooks:
        for _, block in blocks(model):
            hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(leave))
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    whole = zip(outputs, inputs[1:], strict=False)
    if len(inputs) != len(blocks(model)) or any(_first(output) is not after for output, after in whole):
        raise Refusal(
            f"{type(model).__name__} does something between its blocks, so they cannot be left out singly."
        )
    return None if isinstance(outputs[0], Tensor) else len(outputs[0])


def _first(output: Any) -> Tensor:
    stream: Tensor = output if isinstance(output, Tensor) else output[0]
    return stream

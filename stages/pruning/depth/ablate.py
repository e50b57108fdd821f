"""Running a decoder with some of its blocks, or their attention, left out.

It is the model's own forward, with something standing in for the forwards of its blocks. Many sets of
blocks left out share how they begin: they are run in such an order that a run starts from the block where
it first differs from the run before, whose residual stream is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks, check_length, forward
from stages.pruning.depth.observe import Target, first_of, stream_of
from stages.pruning.depth.remove import output_projections

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Rows:
    """Token ids `[rows, tokens]`, and which of them are predicted from those before, bool of that shape."""

    tokens: Tensor
    predicted: Tensor

    @classmethod
    def of(cls, windows: Tensor) -> Rows:
        """Running text: every token of a window but its first is predicted."""
        predicted = torch.ones_like(windows, dtype=torch.bool)
        predicted[:, 0] = False
        return cls(windows, predicted)


class Ablation:
    """A model and the text on which runs of it with some blocks left out are compared.

    Raises:
        Refusal: a family whose blocks do not simply hand each other the stream, or rows it cannot read.
    """

    def __init__(
        self, model: PreTrainedModel, rows: Rows, batch_size: int, target: Target, label: str
    ) -> None:
        check_length(model, rows.tokens)
        self._model, self._rows, self._batch_size, self._label = model, rows, batch_size, label
        self._target = target
        self._names, self._blocks = (list(each) for each in zip(*blocks(model), strict=True))
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
                left = ", ".join(self._names[number] for number in sorted(out))
                what = "the attention of " if self._target == "attention" else ""
                without = f"without {what}{left} " if out else ""
                raise Refusal(f"{without}the model's predictions are NaN or infinite; nothing was written.")
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
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
        found = torch.zeros(len(part), dtype=torch.float64)
        for row, (each, labels, asked) in enumerate(zip(logits, tokens[:, 1:], predicted, strict=True)):
            # A few positions at a time, as a vocabulary wide fp32 copy of all is slow.
            for some, wanted in zip(each[asked].split(64), labels[asked].split(64), strict=True):
                wide = some.float()
                chosen = wide.gather(1, wanted[:, None].to(wide.device))[:, 0]
                found[row] += (chosen - wide.logsumexp(1)).double().sum().cpu()
        return found

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


def _chain(model: PreTrainedModel) -> int | None:
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
    if len(inputs) != len(blocks(model)) or any(first_of(output) is not after for output, after in whole):
        raise Refusal(
            f"{type(model).__name__} does something between its blocks, so they cannot be left out singly."
        )
    return None if isinstance(outputs[0], torch.Tensor) else len(outputs[0])

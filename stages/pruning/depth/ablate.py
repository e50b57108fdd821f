"""Ablation of a decoder: run it without some of its blocks, or without their attention.

Run the model's own forward with the forwards of its blocks patched. Many sets of omitted blocks share their
first blocks. Each run therefore starts at the first block where it differs from the previous run, whose
residual stream before that block is kept; the sets are ordered so that little is run twice.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import mock, torch
from stages.model.blocks import blocks, check_length, forward
from stages.model.positions import sharing, switch_lengths
from stages.pruning.depth.observe import stream_in, stream_out
from stages.pruning.depth.remove import Target, output_projections

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

POSITIONS = 64
"""Positions scored at a time, as fp32 logits of all positions over the whole vocabulary are slow."""


@dataclass(frozen=True)
class ScoredRows:
    """Token ids `[rows, tokens]`, and which of them the model has to predict, bool of the same shape."""

    tokens: Tensor
    predicted: Tensor

    @classmethod
    def of_text(cls, windows: Tensor) -> ScoredRows:
        """Predict every token of running text but the first of each window."""
        predicted = torch.ones_like(windows, dtype=torch.bool)
        predicted[:, 0] = False
        return cls(windows, predicted)

    def lengths(self) -> list[int]:
        """Return the tokens of each row up to the last that is predicted."""
        places = torch.arange(1, self.tokens.shape[1] + 1)
        lengths: list[int] = (self.predicted.cpu() * places).amax(1).clamp(min=1).tolist()
        return lengths


class Ablation:
    """A model and the rows on which its runs without some blocks are compared.

    Args:
        batch_size: rows per forward.
        target: what a run omits.
        label: of the progress bar.

    Raises:
        Refusal: the family changes the stream between blocks, or the rows are longer than it reads.
    """

    def __init__(
        self, model: PreTrainedModel, rows: ScoredRows, batch_size: int, target: Target, label: str
    ) -> None:
        check_length(model, rows.tokens)
        self._model, self._rows, self._batch_size, self._label = model, rows, batch_size, label
        self._target, self._lengths = target, rows.lengths()
        self._names, self._blocks = (list(each) for each in zip(*blocks(model), strict=True))
        self._projections = output_projections(model) if target == "attention" else []
        self._omitted: frozenset[int] = frozenset()
        self._start = 0
        self._streams: list[Tensor] = [torch.empty(0)] * len(self._blocks)
        self._values = _values_returned(model)

    def likelihoods(self, sets: Iterable[frozenset[int]]) -> dict[frozenset[int], Tensor]:
        """Return the log-likelihood of each row's predicted tokens, `[rows]` fp64, by set of omitted blocks.

        Raises:
            Refusal: one is not finite.
        """
        ordered = sorted(set(sets), key=lambda omitted: [n in omitted for n in range(len(self._blocks))])
        scores: dict[frozenset[int], list[Tensor]] = {omitted: [] for omitted in ordered}
        groups = sharing(self._model.config, self._lengths)
        batches = [batch for rows in groups for batch in torch.tensor(rows).split(self._batch_size)]
        with (
            ExitStack() as patches,
            torch.no_grad(),
            tqdm(total=len(batches) * len(ordered), desc=self._label, unit="forward") as bar,
        ):
            self._patch(patches)
            for batch in batches:
                previous: frozenset[int] | None = None
                for omitted in ordered:
                    self._omitted = omitted
                    self._start = 0 if previous is None else min(omitted ^ previous)
                    scores[omitted].append(self._score(batch))
                    previous = omitted
                    bar.update()
        order = torch.cat(batches).argsort()
        joined = {omitted: torch.cat(parts)[order] for omitted, parts in scores.items()}
        for omitted, values in joined.items():
            if not values.isfinite().all():
                names = ", ".join(self._names[number] for number in sorted(omitted))
                kind = "the attention of " if self._target == "attention" else ""
                without = f" without {kind}{names}" if omitted else ""
                raise Refusal(
                    f"the model's predictions{without} are NaN or infinite; nothing was written. Set "
                    "run.dtype to bfloat16 or float32, or check the source."
                )
        return joined

    def losses(self, sets: Iterable[frozenset[int]]) -> dict[frozenset[int], float]:
        """Return the mean loss in nats per predicted token by set of omitted blocks."""
        return {omitted: self.loss(values) for omitted, values in self.likelihoods(sets).items()}

    def loss(self, likelihoods: Tensor) -> float:
        """Return the mean loss in nats per predicted token, from `[rows]` log-likelihoods."""
        return -float(likelihoods.sum()) / int(self._rows.predicted.sum())

    def _score(self, batch: Tensor) -> Tensor:
        """Return the log-likelihoods of the rows with these numbers, `[batch]` fp64."""
        model: Any = self._model
        tokens, predicted = self._rows.tokens[batch], self._rows.predicted[batch, 1:]
        if switch_lengths(model.config):  # padding counts as text
            longest = max(self._lengths[row] for row in batch.tolist())
            tokens, predicted = tokens[:, :longest], predicted[:, : longest - 1]
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
        scores = torch.zeros(len(batch), dtype=torch.float64)
        for row, (row_logits, labels, chosen) in enumerate(
            zip(logits, tokens[:, 1:], predicted, strict=True)
        ):
            pieces = row_logits[chosen].split(POSITIONS), labels[chosen].split(POSITIONS)
            for piece, ids in zip(*pieces, strict=True):
                wide = piece.float()
                picked = wide.gather(1, ids[:, None].to(wide.device))[:, 0]
                scores[row] += (picked - wide.logsumexp(1)).double().sum().cpu()
        return scores

    def _patch(self, stack: ExitStack) -> None:
        """Patch the blocks and hook the output projections until the stack closes."""
        for number, block in enumerate(self._blocks):
            stack.enter_context(mock.patch.object(block, "forward", self._step(number, block.forward)))
        for number, linear in enumerate(self._projections):
            stack.enter_context(linear.module.register_forward_hook(self._silence(number)))

    def _step(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward for a block: the block itself, its input if omitted, anything before the start."""

        def step(*args: Any, **kwargs: Any) -> Any:
            stream = stream_in(args, kwargs)
            if number >= self._start:
                stream = self._streams[number] if 0 < number == self._start else stream
                self._streams[number] = stream
                if not (number in self._omitted and self._target == "block"):
                    if args:
                        return original(stream, *args[1:], **kwargs)
                    return original(**{**kwargs, "hidden_states": stream})
            return stream if self._values is None else (stream, *[None] * (self._values - 1))

        return step

    def _silence(self, number: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        """Return a hook that zeroes the output of an attention if its block is omitted."""
        return lambda _, __, output: torch.zeros_like(output) if number in self._omitted else None


def _values_returned(model: PreTrainedModel) -> int | None:
    """Return how many values a block returns, None for a bare tensor.

    Raises:
        Refusal: a block is not handed the very tensor that the block before it returned, or reads what
            others wrote elsewhere.
    """
    outputs: list[Any] = []
    inputs: list[Tensor] = []
    shared: dict[str, Any] = {}

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(stream_in(args, kwargs))
        shared.update({key: value for key, value in kwargs.items() if isinstance(value, UserDict)})

    def after(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)

    with ExitStack() as hooks:
        for _, block in blocks(model):
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(after))
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    if names := [name for name, tensors in shared.items() if tensors]:
        raise Refusal(
            f"blocks of {type(model).__name__} read what earlier ones leave in {names[0]}, so none can be "
            "omitted; use metric block-influence, angular or reverse."
        )
    links = zip(outputs, inputs[1:], strict=False)
    if len(inputs) != len(blocks(model)) or any(
        stream_out(output) is not entered for output, entered in links
    ):
        raise Refusal(
            f"{type(model).__name__} changes the residual stream between blocks, so no block can be omitted; "
            "use metric block-influence, angular or reverse."
        )
    return None if isinstance(outputs[0], torch.Tensor) else len(outputs[0])

"""Information Emergence: how much more a block keeps of a token read in context than of one read alone
(2405.12617).

A block turns the state h of a token into h'. The mutual information I(h'; h) is the share of the entropy of
h' that knowing h removes. The macro variable is the state of a window's last token, which has seen the whole
window; the micro variable is the state of the same token fed alone, in both after BOS where the model expects
it. For each block, in bits,

    IE = I(h'; h) of the macro variable - I(h'; h) of the micro variable

A token fed alone has no context at any position, so the last tokens of the windows stand for all tokens.

Mutual information is estimated by a small network (`stages.evaluation.mine`), fitted on one half of the
windows and read on all pairs of the other half. It is a lower bound, and at most log2 of the pairs read, so
values compare models on the same text, windows and seed only. Both informations are scores too: where both
are near the bound, their difference says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import spaced
from stages.core.schema import Strict
from stages.core.tables import Score
from stages.corpus.windows import begin_windows, cut_windows, read_documents
from stages.evaluation.means import mean
from stages.model.blocks import blocks, check_length, forward

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from torch import Tensor, nn


class Emergence(Strict):
    """How Information Emergence is estimated."""

    windows: Annotated[int, Field(ge=64)] = 1024
    """Half of them to fit on, half to read."""
    sequence_length: Annotated[int, Field(ge=2)] = 8
    """Tokens of text in a window; BOS comes on top."""
    steps: Annotated[int, Field(ge=1)] = 200
    """Steps of fitting."""
    width: Annotated[int, Field(ge=1)] = 64
    """Width of the network."""

    def evaluate(self, lm: HFLM, name: str, seed: int, batch_size: int, bos: list[int]) -> list[Score]:
        """Score the mean over blocks, then each block, named in `difficulty`; so for both informations.

        Args:
            bos: the tokens to put before a window, and before a token alone.

        Raises:
            Refusal: the text has too few windows, or they are longer than the model reads.
        """
        from stages.evaluation.mine import bound, mutual_information  # imports torch

        rows = self._rows(lm, name, seed)
        whole, alone = (
            states(lm.model, begin_windows(part, bos), batch_size) for part in (rows, rows[:, -1:])
        )
        macro: list[float] = []
        micro: list[float] = []
        for block in tqdm(range(len(whole) - 1)):
            for values, side in ((macro, whole), (micro, alone)):
                values.append(mutual_information(side[block], side[block + 1], self.steps, self.width, seed))
        digits = len(str(len(macro) - 1))
        gained = [more - less for more, less in zip(macro, micro, strict=True)]
        metrics = {
            "information_emergence": gained, "macro_information": macro, "micro_information": micro,
        }  # fmt: skip
        return [
            Score(
                task=f"emergence-{name}",
                task_version=f"InfoNCE, windows of {self.sequence_length}, {self.steps} steps, width "
                f"{self.width}; an information is at most {bound(self.windows):.2f} bits",
                shots=0,
                bos=bool(bos),
                difficulty=level,
                readout="states",
                metric=metric,
                value=value,
                num_items=self.windows - self.windows // 2,
                higher_is_better=True,
                seed=seed,
            )
            for metric, values in metrics.items()
            for level, value in {
                "all": mean(values),
                **{f"block-{block:0{digits}}": value for block, value in enumerate(values)},
            }.items()
        ]

    def _rows(self, lm: HFLM, name: str, seed: int) -> Tensor:
        """Return windows from all over the text in a random order, `[windows, sequence_length]` int64."""
        whole = cut_windows(lm.tokenizer, read_documents(name, "evaluation"), self.sequence_length)
        if len(whole) < self.windows:
            raise Refusal(
                f"suites.perplexity.{name}.emergence.windows is {self.windows}, but the evaluation split has "
                f"{len(whole)} windows of {self.sequence_length} tokens; ask for fewer."
            )
        rows = whole[spaced(len(whole), self.windows)]
        draw = torch.Generator().manual_seed(seed)
        return rows[torch.randperm(len(rows), generator=draw)]


def states(model: nn.Module, rows: Tensor, batch_size: int) -> list[Tensor]:
    """Return the last token's state before the first block and after each, `[rows, hidden]` fp32 on the CPU.

    Args:
        rows: `[rows, tokens]` int64.
    """
    check_length(model, rows)
    layers = [block for _, block in blocks(model)]
    kept: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def keep(place: int, state: Any) -> None:
        state = state[0] if isinstance(state, tuple) else state
        kept[place].append(state[:, -1].float().cpu())

    def keep_input(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(0, inputs[0] if inputs else named["hidden_states"])

    hooks = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    hooks += [
        layer.register_forward_hook(lambda _module, _inputs, out, place=place: keep(place, out))
        for place, layer in enumerate(layers, 1)
    ]
    for batch in rows.split(batch_size):
        forward(model, batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in kept]

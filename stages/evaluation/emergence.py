"""Information Emergence: how much more of a sequence than of a lone token a block passes on (2405.12617).

A block turns the state h of a token into h'. I(h; h') is the entropy of h' that h takes away. The macro
variable is the state of a window's last token, which has seen all of the window; the micro variable is that
of the same token fed alone. By block, IE = I(h'; h) of the macro variable - I(h'; h) of the micro variable,
in bits. Where a token stands is nothing to a token fed alone, so the last ones stand for all.

Mutual information is estimated by the Donsker-Varadhan bound with a small network (MINE, 1801.04062),
E_joint[f] - log E_marginal[exp f]. It is fitted on one half of the windows and read on the other, by all
their pairs: a bound read where it was fitted grows with the network. What is read is still a lower bound,
and at most about log2 of the pairs, so values compare models on the same text, windows and seed only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Strict
from stages.corpus.windows import documents, windows
from stages.model.blocks import blocks

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from torch import Tensor, nn


class Emergence(Strict):
    """How Information Emergence is estimated."""

    windows: Annotated[int, Field(ge=64)] = 1024
    """Half to fit on, half to read."""
    sequence_length: Annotated[int, Field(ge=2)] = 8
    """Tokens of a window."""
    steps: Annotated[int, Field(ge=1)] = 200
    """Of fitting."""
    width: Annotated[int, Field(ge=1)] = 64
    """Of the network."""

    def evaluate(self, lm: HFLM, name: str, seed: int, batch_size: int) -> list[dict[str, Any]]:
        """A score row a block, its place as `difficulty`, and their mean.

        Raises:
            Refusal: the text is shorter than the windows asked for.
        """
        from stages.evaluation.mine import mutual_information

        cut = windows(lm.tokenizer, documents(name, "evaluation"), self.sequence_length)
        if len(cut) < self.windows:
            raise Refusal(
                f"suites.perplexity.{name}.emergence.windows: {self.windows} asked for, the evaluation split "
                f"has {len(cut)} of {self.sequence_length} tokens; ask for fewer."
            )
        picked = cut[torch.linspace(0, len(cut) - 1, self.windows).round().long()]
        draw = torch.Generator().manual_seed(seed)
        picked = picked[torch.randperm(len(picked), generator=draw)]
        whole, alone = states(lm.model, picked, batch_size), states(lm.model, picked[:, -1:], batch_size)
        found = []
        for before, after in tqdm(list(zip(range(len(whole) - 1), range(1, len(whole)), strict=True))):
            macro, micro = (
                mutual_information(told[before], told[after], self.steps, self.width, seed)
                for told in (whole, alone)
            )
            found.append(macro - micro)
        digits = len(str(len(found) - 1))
        by_block = {f"block-{place:0{digits}}": value for place, value in enumerate(found)}
        shared = {
            "task": f"emergence-{name}", "readout": "states", "metric": "information_emergence",
            "task_version": f"windows of {self.sequence_length}, {self.steps} steps, width {self.width}",
            "template": "none", "shots": 0, "num_items": self.windows - self.windows // 2,
            "higher_is_better": True, "seed": seed,
        }  # fmt: skip
        return [
            {**shared, "difficulty": level, "value": value}
            for level, value in {"all": math.fsum(found) / len(found), **by_block}.items()
        ]


def states(model: nn.Module, rows: Tensor, batch_size: int) -> list[Tensor]:
    """The last token's state before the first block and after each, `[rows, hidden]` fp32 on the CPU.

    Args:
        rows: `[rows, tokens]` int64.
    """
    layers = [block for _, block in blocks(model)]
    seen: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def keep(place: int, state: Any) -> None:
        state = state[0] if isinstance(state, tuple) else state
        seen[place].append(state[:, -1].float().cpu())

    def first(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(0, inputs[0] if inputs else named["hidden_states"])

    hooks = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    hooks += [
        layer.register_forward_hook(lambda _module, _inputs, out, place=place: keep(place, out))
        for place, layer in enumerate(layers, 1)
    ]
    body: Any = model.base_model
    device = body.get_input_embeddings().weight.device
    with torch.no_grad():
        for batch in rows.split(batch_size):
            body(input_ids=batch.to(device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]

"""The first block of a tiny model with its input groups, for tests of what happens to a block's weights."""

import copy
from typing import Any

import torch
from torch import nn

from stages.compress.capture import input_groups
from stages.model.blocks import blocks, linears
from stages.quantization.feeds import find_feeds
from tests import families


class FirstBlock:
    """The first block of a model and its groups; a call runs the block on the arguments the model passed."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(dtype)
        self.name, self.block = blocks(self.model)[0]
        calls: list[Any] = []
        handle = self.block.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        tokens = families.windows(1, 24)
        with torch.no_grad():
            self.model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
        handle.remove()
        ((self.args, self.kwargs),) = calls
        inside = [linear for linear in linears(self.model) if linear.block == self.name]
        self.groups = input_groups(self.block, inside, self)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            output = self.block(*self.args, **self.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def feeds(self) -> dict[str, Any]:
        """Return the feed of each group, by the name of the group's first linear."""
        with torch.no_grad():
            feeds = find_feeds(self.groups, lambda: [self()])
        names = [group.linears[0].name.removeprefix(f"{self.name}.") for group in self.groups]
        return dict(zip(names, feeds, strict=True))

    def names(self) -> dict[str, str | None]:
        """Return the name of each feed's module, by the name of the group's first linear."""
        names = {module: name for name, module in self.block.named_modules()}
        return {group: feed and names[feed.module] for group, feed in self.feeds().items()}


def shaken(family: str, **settings: Any) -> nn.Module:
    """Make a model of the family whose norms and biases are not the ones and zeros they start from."""
    model = families.model(family)
    if settings:
        config = copy.deepcopy(families.CONFIGS[family])
        config.update(settings)
        torch.manual_seed(0)
        model = type(model)(config).eval().to(families.DEVICE)
    draw = torch.Generator().manual_seed(1)
    for _, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += (torch.randn(parameter.shape, generator=draw) / 4).to(parameter)
    return model


def scales(width: int, seed: int = 0) -> torch.Tensor:
    """Draw positive scales of different sizes."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).to(families.DEVICE).exp()

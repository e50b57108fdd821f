"""Tied tensors: a config that claims them must be true of the files.

Most small models use the embedding's matrix as output head too, and their config says so
(`tie_word_embeddings`). A fine-tuned or converted checkpoint may have a head of its own under a config that
still says tied. Plain `from_pretrained` compares the two and keeps both, but whoever ties a loaded model
again, as lm-eval does, or builds it from its config, as streaming does, drops the head without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core.errors import Refusal
from stages.core.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def correct_ties(model: PreTrainedModel, source: str) -> dict[str, str]:
    """Make the config of a model loaded by `from_pretrained` claim the ties it has, in place.

    Returns:
        The tensors that the config called tied and the files hold apart, as {tensor: its claimed source}.

    Raises:
        Refusal: no config of this family describes the ties.
    """
    true = dict(model.all_tied_weights_keys)  # from_pretrained has taken out those that differ
    untrue = {name: other for name, other in _claimed(model).items() if name not in true}
    if not untrue:
        return {}
    for prefix, module in model.named_modules():
        names = {f"{prefix}.{name}".lstrip(".") for name in _own(module)}
        if names & untrue.keys():
            module.config.tie_word_embeddings = False
    claimed = _claimed(model)
    if left := sorted(untrue.keys() & claimed.keys()):
        raise Refusal(
            f"{source}: its files hold {', '.join(left)} apart from {untrue[left[0]]}, but a config of "
            f"{type(model).__name__} can only tie them; use another checkpoint."
        )
    for name in true.keys() - claimed.keys():  # the same setting tied these too: store them apart
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, torch.nn.Parameter(module.get_parameter(leaf).detach().clone()))
    model.all_tied_weights_keys = claimed
    return dict(sorted(untrue.items()))


def _claimed(model: PreTrainedModel) -> dict[str, str]:
    """Return the ties that the configs of a model and its parts claim, {tensor: its source}."""
    claimed: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return claimed


def _own(module: torch.nn.Module) -> dict[str, str]:
    """Return the ties that a module's own config claims, named within the module."""
    claims = getattr(module, "get_expanded_tied_weights_keys", None)
    own: dict[str, str] = claims(all_submodels=False) if claims else {}
    return own

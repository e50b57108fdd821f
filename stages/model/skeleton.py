"""Build models from their config alone: the modules and the shapes of weights, without memory for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(config: Any) -> PreTrainedModel:
    """Return the model of a transformers config, unquantized, with its tensors on torch's meta device.

    The config's `quantization_config` is removed.
    """
    from transformers import AutoModelForCausalLM

    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def skeleton_of(folder: Path) -> PreTrainedModel:
    """Return the model of a checkpoint's config.json, its tensors on torch's meta device."""
    from transformers import AutoConfig

    return skeleton(AutoConfig.from_pretrained(folder, local_files_only=True))

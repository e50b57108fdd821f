"""Settings and download shared by base models of every format.

Whatever the files of a source claim, the downloaded copy says what is true: its config ties exactly the
tensors that are equal, and every parameter and stored buffer is finite in `run.dtype`. So plain transformers,
lm-eval (which ties once more what a config calls tied) and every later stage load the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.files import MODELS, writing
from stages.core.lazy import torch
from stages.core.memory import exhausted
from stages.core.numbers import check_finite
from stages.core.reading import reason
from stages.core.schema import Strict
from stages.model.blocks import input_widths
from stages.model.causal import check_causal
from stages.model.ties import correct_ties
from stages.sources.origin import Origin, portable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.core.run import Run


class Model(Strict):
    """A base model: its source, and the input widths of its block linears."""

    source: Origin
    in_features: Annotated[tuple[int, ...], Field(min_length=1)]
    """Input widths of the linears in its blocks, ascending. They are declared so that a `group_size` that
    does not divide them is refused before anything is downloaded, and checked against the downloaded
    model."""

    def write(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Write config, tokenizer and `dtype` safetensors into `folder`; return facts for the record."""
        raise NotImplementedError

    def download(self, key: str, run: Run) -> None:
        """Write data/models/base/<key>.

        Raises:
            Refusal: the source cannot be fetched, differs from params, does not run, or is no causal language
            model.
        """
        from stages.model.checkpoint import finish_base  # imports safetensors

        run.start()
        with writing(MODELS / "base" / key) as folder:
            facts = self.write(folder, run.torch_dtype)
            record = {"name": key, **portable(self.model_dump(mode="json")), **facts}
            model = finish_base(f"base/{key}", folder, record)
            try:
                check_causal(model)
            except NotImplementedError:
                pass  # a device may lack a kernel; evaluation asks on its own
            except RuntimeError as error:
                if exhausted(error):
                    raise
                raise Refusal(
                    f"models.{key} is {model.config.model_type}, which fails on a few tokens of text "
                    f"({reason(error)}); use another model."
                ) from error
            widths = input_widths(model)
            if widths != self.in_features:
                raise Refusal(
                    f"models.{key}.in_features is {list(self.in_features)}, but the model has "
                    f"{list(widths)}; write in_features: {list(widths)}."
                )


def write_checkpoint(model: PreTrainedModel, source: str, folder: Path) -> dict[str, Any]:
    """Write a model that was loaded from `source` into `folder`; return facts for the record.

    Raises:
        Refusal: values are NaN or infinite in the model's dtype, or no config describes its ties.
    """
    check_finite(f"{source} in {str(model.dtype).removeprefix('torch.')}", stored_floats(model))
    untied = correct_ties(model, source)
    model.config.__dict__.pop("quantization_config", None)
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    return {"untied": untied} if untied else {}


def stored_floats(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint holds of a model, parameters and stored buffers, as far as it is floats."""
    return (item for item in model.state_dict().items() if item[1].is_floating_point())

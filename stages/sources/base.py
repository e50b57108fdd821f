"""What every downloaded model declares, whatever format it is stored in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Strict
from stages.sources.origin import Origin, portable

if TYPE_CHECKING:
    from stages.core.run import Run


class Model(Strict):
    """A base model: where it is from, and the input widths of its block linears."""

    source: Origin
    in_features: Annotated[tuple[int, ...], Field(min_length=1)]
    """Input widths of the linears in its blocks, ascending. Declared so that a `group_size` that does not
    divide them is refused before anything is downloaded; checked against the model when it is."""

    def write(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Write config, tokenizer and `dtype` safetensors into `folder`; return facts for the record."""
        raise NotImplementedError

    def download(self, key: str, run: Run) -> None:
        """Write data/models/base/<key>.

        Raises:
            Refusal: the source cannot be had or is not what params say.
        """
        from stages.core.files import MODELS, writing
        from stages.model.blocks import linears
        from stages.model.checkpoint import finish_base

        run.start()
        with writing(MODELS / "base" / key) as folder:
            facts = self.write(folder, run.torch_dtype)
            told = {"name": key, **portable(self.model_dump(mode="json")), **facts}
            model = finish_base(f"base/{key}", folder, told)
            widths = tuple(sorted({linear.weight.shape[1] for linear in linears(model, partial=True)}))
            if widths != self.in_features:
                raise Refusal(
                    f"models.{key}.in_features is {list(self.in_features)}, the model has {list(widths)}; "
                    f"write in_features: {list(widths)}."
                )

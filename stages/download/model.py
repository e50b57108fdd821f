"""What every downloaded model declares, whatever format it is stored in."""

from typing import Annotated

from pydantic import Field

from stages.core.schema import Strict
from stages.download.source import Origin


class Model(Strict):
    """A base model: where it is from, and the input widths of its block linears."""

    source: Origin
    in_features: Annotated[tuple[int, ...], Field(min_length=1)]
    """Input widths of the linears in its blocks, ascending. Declared so that a `group_size` that does not
    divide them is refused before anything is downloaded; checked against the model when it is."""

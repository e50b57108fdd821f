"""The allocations a recipe can name."""

from typing import Annotated

from pydantic import Field

from stages.pruning.allocation.alpha import Alpha
from stages.pruning.allocation.erk import ERK
from stages.pruning.allocation.layer_if import LayerIF
from stages.pruning.allocation.owl import OWL
from stages.pruning.allocation.uniform import Uniform

AnyAllocation = Annotated[Uniform | ERK | OWL | Alpha | LayerIF, Field(discriminator="kind")]
EVENLY = Uniform(kind="uniform")
"""The default."""

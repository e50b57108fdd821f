"""What a method that acts on one weight at a time is, and running it over a whole model.

Such a method is a recipe: frozen settings, the statistic it wants of a linear's inputs (None is
data-free), and a pure function of a weight and that statistic. It knows no modules, files or devices.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from stages.core.calibration import Calibration, Tokens
from stages.core.grid import Quantized
from stages.core.schema import NoData, Recipe
from stages.core.statistics import DeadInputs, Statistic

if TYPE_CHECKING:
    from stages.core.blocks import Linear
    from stages.core.run import Run
    from stages.core.stream import Empty
    from stages.core.walk import Group


class WeightMethod(Recipe):
    """A recipe whose method replaces one weight `[out, in]` at a time."""

    statistic: ClassVar[type[Statistic] | None] = None
    """What it wants to know of a linear's inputs."""
    on_dead: ClassVar[str] = "treated like any other"
    """What it does with weights whose input was zero on every token, as told in the log."""
    prepares: ClassVar[bool] = False
    """Whether it changes a block as a whole before its weights are replaced; needs `sequential: block`."""
    calibration: Tokens | NoData
    """The text its statistic is taken on."""

    def plan(self, source: "Empty", windows: Callable[[], Tensor]) -> Any:
        """What has to be known of the whole source before the first block; handed to `replace`.

        Args:
            source: its blocks are without weights until they are asked for.
            windows: gives the token ids it is calibrated on, `[num_samples, sequence_length]`. They may have
                to be generated first, so what can be refused without them is.
        """
        return None

    def prepare(self, groups: "list[Group]", block: Callable[[], Any]) -> dict[str, list[str]]:
        """Change a block before any of its weights is replaced; called where `prepares` is set.

        Args:
            block: computes the block's output for the window whose inputs the groups hold.

        Returns:
            What to note of this block; the artifact's record joins the lists of all blocks.
        """
        return {}

    def replace(self, linear: "Linear", statistic: Any, plan: Any) -> "Tensor | Quantized":
        """The new weight of a linear, or its codes."""
        raise NotImplementedError

    def execute(self, artifact: str, run: "Run") -> None:
        """Write `artifact`, the source with the weight of every linear of every block replaced."""
        from stages.core.generation import model_windows
        from stages.core.stream import Empty, Streamed
        from stages.core.walk import walk

        home = Streamed(artifact, self, run)
        dead = DeadInputs(self.on_dead)

        def prepare(groups: "list[Group]", block: Callable[[], Any]) -> None:
            home.noted |= self.prepare(groups, block)

        @cache
        def windows() -> Tensor:
            assert isinstance(self.calibration, Tokens)
            return model_windows(home.tokenizer, self.calibration, home.whole)

        plan = self.plan(Empty(self.source, run), windows)
        options: dict[str, Any] = {}
        if self.statistic:
            assert isinstance(self.calibration, Calibration)
            text = windows()  # before the embeddings are, as to generate them takes the whole model
            home.bring_rest()
            options = {
                "windows": text,
                "statistic": self.statistic,
                "sequential": self.calibration.sequential,
                "batch_size": self.calibration.batch_size,
                "prepare": prepare if self.prepares else None,
            }

        def compress(linear: "Linear", statistic: Statistic | None) -> Tensor:
            if statistic:
                dead.tell(linear.name, statistic.dead())
            made = self.replace(linear, statistic, plan)
            if not isinstance(made, Quantized):
                return made
            home.quantized[linear.name] = made
            return made.checked(linear.weight)

        walk(home.model, compress, **options, ignore=self.ignore, label=artifact, home=home)
        home.finish(self.notes(plan))

    def notes(self, plan: Any) -> dict[str, Any]:
        """Facts for the artifact's record, constant from run to run."""
        return {}

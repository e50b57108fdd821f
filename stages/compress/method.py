"""What a method that acts on one weight at a time is, and running it over a whole model.

Such a method is a recipe: frozen settings, the statistic it wants of a linear's inputs (None is
data-free), and a pure function of a weight and that statistic. It knows no modules, files or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from stages.compress.statistics import DeadInputs, Statistic
from stages.core.schema import NoData, Recipe
from stages.corpus.windows import Calibration, Tokens
from stages.model.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.compress.walk import Group
    from stages.core.run import Run
    from stages.model.blocks import Linear
    from stages.model.stream import Empty


class Compression(Recipe):
    """A recipe that prunes or quantizes its source."""

    calibration: Any
    """The text the method is calibrated on; `{dataset: none}` for a method that reads none."""

    def reads(self) -> dict[str, Any]:
        """Return the calibration, unless it reads no data set."""
        free = isinstance(self.calibration, NoData) or getattr(self.calibration, "tokens", None) == "random"
        return {} if free else {"calibration": self.calibration}

    def execute(self, artifact: str, run: Run) -> None:
        """Write `artifact`, the compressed source.

        Raises:
            Refusal: the settings do not fit the source, or its family cannot be served.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Change:
    """What a whole-model method did to a model, which now holds the result."""

    zeros: Mapping[str, Tensor]
    """Positions that must be zero in the file, bool, shaped as stored, by the linear's full name."""
    notes: Mapping[str, Any]
    """Facts for the artifact's record, constant from run to run."""


@dataclass(frozen=True)
class Context:
    """What a whole-model method may use beside the model."""

    tokenizer: PreTrainedTokenizerBase
    windows: Callable[[], Tensor]
    """Makes the token ids it is calibrated on, `[num_samples, sequence_length]`."""
    seed: int
    """The run's, for draws that the recipe does not seed."""
    label: str
    """The artifact, as progress bars show it."""


class WholeModel(Compression):
    """A recipe whose method needs the whole model in memory: it removes parts, or goes in steps."""

    def check(self) -> None:
        """Refuse settings that the source's config alone shows to be wrong; no weight is read."""

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Compress `model` in place.

        Raises:
            Refusal: the settings do not fit the model, or its family cannot be served.
        """
        raise NotImplementedError

    def execute(self, artifact: str, run: Run) -> None:
        """Load the source, change it, and write it as `artifact`."""
        from stages.corpus.generation import model_windows
        from stages.model import checkpoint
        from stages.model.artifact import load_tokenizer
        from stages.model.source import loaded

        self.check()
        tokenizer = load_tokenizer(self.source)  # refused before any work
        model = loaded(self.source, run)

        def windows() -> Tensor:
            return model_windows(tokenizer, self.calibration, lambda: model)

        done = self.change(model, Context(tokenizer, windows, run.seed, artifact))
        checkpoint.save(artifact, model, self, run, keep=done.zeros, notes=done.notes)


class WeightMethod(Compression):
    """A recipe whose method replaces one weight `[out, in]` at a time."""

    statistic: ClassVar[type[Statistic] | None] = None
    """What it wants to know of a linear's inputs."""
    on_dead: ClassVar[str] = "treated like any other"
    """What it does with weights whose input was zero on every token, as told in the log."""
    prepares: ClassVar[bool] = False
    """Whether it changes a block as a whole before its weights are replaced; needs `sequential: block`."""
    calibration: Tokens | NoData
    """The text its statistic is taken on."""

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> Any:
        """What has to be known of the whole source before the first block; handed to `replace`.

        Args:
            source: its blocks are without weights until they are asked for.
            windows: gives the token ids it is calibrated on, `[num_samples, sequence_length]`. They may have
                to be generated first, so what can be refused without them is.
        """
        return None

    def prepare(self, groups: list[Group], block: Callable[[], Any]) -> dict[str, list[str]]:
        """Change a block before any of its weights is replaced; called where `prepares` is set.

        Args:
            block: computes the block's output for the window whose inputs the groups hold.

        Returns:
            What to note of this block; the artifact's record joins the lists of all blocks.
        """
        return {}

    def replace(self, linear: Linear, statistic: Any, plan: Any) -> Tensor | Quantized:
        """The new weight of a linear, or its codes."""
        raise NotImplementedError

    def execute(self, artifact: str, run: Run) -> None:
        """Write `artifact`, the source with the weight of every linear of every block replaced."""
        from stages.compress.walk import walk
        from stages.corpus.generation import model_windows
        from stages.model.stream import Empty, Streamed

        home = Streamed(artifact, self, run)
        dead = DeadInputs(self.on_dead)

        def prepare(groups: list[Group], block: Callable[[], Any]) -> None:
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

        def compress(linear: Linear, statistic: Statistic | None) -> Tensor:
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

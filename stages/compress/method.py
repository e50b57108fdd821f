"""The two kinds of compression method, and how a recipe's method becomes an artifact.

A recipe is frozen settings plus arithmetic. What it needs from the rest of the project decides its kind:

- `WeightMethod` replaces one weight `[out, in]` at a time: a pure function of the weight and a statistic of
  its inputs. The model passes through memory block by block (`stages.model.stream`).
- `WholeModel` changes a loaded model in place: it removes parts, or works in steps.

Neither kind handles devices or files; `execute` does that for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from stages.compress import drift
from stages.compress.home import InMemory
from stages.compress.statistics import DeadInputs, Statistic
from stages.compress.walk import walk
from stages.core.schema import NoData, Recipe
from stages.corpus.bos import bos_tokens
from stages.corpus.generation import model_windows
from stages.corpus.windows import Calibration, Tokens
from stages.model import checkpoint
from stages.model.artifact import load_tokenizer
from stages.model.blocks import embedding_rows
from stages.model.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.compress.capture import Group
    from stages.core.run import Run
    from stages.model.blocks import Linear
    from stages.model.source import Empty
    from stages.model.stream import Streamed


class Compression(Recipe):
    """A recipe that prunes or quantizes its source."""

    calibration: Any
    """The text the method is calibrated on; `{dataset: none}` if it reads none."""

    def reads(self) -> dict[str, Any]:
        """Return the calibration, unless it reads no data set."""
        free = isinstance(self.calibration, NoData) or getattr(self.calibration, "tokens", None) == "random"
        return {} if free else {"calibration": self.calibration}

    def bos_note(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
        """Return, for the record, whether the calibration's rows begin with BOS; nothing if it reads none.

        Raises:
            Refusal: they must begin with BOS, and the tokenizer has none.
        """
        if isinstance(self.calibration, NoData):
            return {}
        return {"bos": bool(bos_tokens(tokenizer, self.calibration.bos))}

    def execute(self, artifact: str, run: Run) -> None:
        """Compress the source and write it as `artifact`.

        Raises:
            Refusal: the settings do not fit the source, or the method does not serve its family.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Change:
    """What a whole-model method did to a model, which now holds the result."""

    zeros: Mapping[str, Tensor]
    """Positions that must be zero in the file, bool, shaped as stored, by the linear's full name."""
    notes: Mapping[str, Any]
    """Facts for the artifact's record, constant from run to run."""
    remaining: Sequence[int] | None = None
    """The numbers of the source's blocks that remain, in order; None is all."""


@dataclass(frozen=True)
class Context:
    """What a whole-model method may use besides the model."""

    tokenizer: PreTrainedTokenizerBase
    windows: Callable[[], Tensor]
    """Returns the calibration's token ids, `[num_samples, sequence_length]`."""
    seed: int
    """The run's seed, for draws that the recipe does not seed."""
    label: str
    """The artifact's name, for progress bars."""


class WholeModel(Compression):
    """A recipe whose method changes a loaded model in place.

    A method implements `change`; `check` is for mistakes that show before the model is loaded.
    """

    def check(self) -> None:
        """Refuse settings that do not fit the source's config; no weight is read."""

    def change(self, model: PreTrainedModel, context: Context) -> Change:
        """Compress `model` in place.

        Raises:
            Refusal: the settings do not fit the model, or the method does not serve its family.
        """
        raise NotImplementedError

    def execute(self, artifact: str, run: Run) -> None:
        """Load the source, change it, and write it as `artifact`."""
        from stages.model.source import load_source

        self.check()
        tokenizer = load_tokenizer(self.source)  # refused before any work, as is a BOS that it lacks
        bos = self.bos_note(tokenizer)
        model = load_source(self.source, run)

        def windows() -> Tensor:
            return model_windows(tokenizer, self.calibration, embedding_rows(model), lambda: model)

        sample = drift.sample_windows(self.calibration, tokenizer, embedding_rows(model))
        before = [] if sample is None else drift.block_outputs(model, sample, InMemory())
        change = self.change(model, Context(tokenizer, windows, run.seed, artifact))
        notes = {**change.notes, **bos}
        if sample is not None:
            plain = drift.rebuilt(model) if self.reshapes else model
            after = drift.block_outputs(plain, sample, InMemory())
            kept = before if change.remaining is None else [before[number] for number in change.remaining]
            notes |= drift.error_note(kept, after)
        checkpoint.save(artifact, model, self, run, zeros=change.zeros, notes=notes)


class WeightMethod(Compression):
    """A recipe whose method replaces the weights of all block linears, one at a time.

    A method implements `replace`, or `replace_group` if it is faster on linears that share their inputs, and
    sets `statistic` if it needs to know these. `plan` runs before the first block and sees the whole source;
    `prepare` may change a block before its weights are replaced.
    """

    statistic: ClassVar[type[Statistic] | None] = None
    """The statistic taken of each linear's inputs; None is data-free."""
    on_dead: ClassVar[str] = "treated like any other"
    """What happens to weights whose input was zero on every token, as the log says it."""
    prepares: ClassVar[bool] = False
    """Whether the method has a `prepare`, which needs `sequential: block`."""
    calibration: Tokens | NoData
    """The text the statistic is taken on."""

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> Any:
        """Return whatever `replace` needs to know of the whole source.

        Args:
            source: a model without weights, whose blocks are loaded on request.
            windows: returns the calibration's token ids, `[num_samples, sequence_length]`. They may have to
                be generated, so refuse what can be refused before calling it.
        """
        return None

    def prepare(self, groups: list[Group], block: Callable[[], list[Tensor]]) -> dict[str, list[str]]:
        """Change a block before any of its weights is replaced; called if `prepares` is set.

        Args:
            block: see `stages.compress.block_steps.Prepare`.

        Returns:
            Notes on this block; the artifact's record joins the lists of all blocks.
        """
        return {}

    def replace(self, linear: Linear, statistic: Any, plan: Any) -> Tensor | Quantized:
        """Return the new weight of a linear, or its codes."""
        raise NotImplementedError

    def replace_group(
        self, linears: Sequence[Linear], statistic: Any, plan: Any
    ) -> Iterator[Tensor | Quantized]:
        """Yield the new weights, or their codes, of linears that share their inputs, in this order."""
        return (self.replace(linear, statistic, plan) for linear in linears)

    def notes(self, plan: Any) -> dict[str, Any]:
        """Return facts for the artifact's record, constant from run to run."""
        return {}

    def execute(self, artifact: str, run: Run) -> None:
        """Stream the source block by block, replace its weights, and write it as `artifact`."""
        from stages.model.source import Empty
        from stages.model.stream import Streamed

        source = Streamed(artifact, self, run)
        bos = self.bos_note(source.tokenizer)

        @cache
        def windows() -> Tensor:
            assert isinstance(self.calibration, Tokens)
            rows = embedding_rows(source.model)
            return model_windows(source.tokenizer, self.calibration, rows, source.whole)

        plan = self.plan(Empty(self.source, run), windows)
        # Generating windows loads the whole model, so it comes before embeddings are loaded.
        text = windows() if self.statistic else None
        self._replace_all(source, plan, text)
        source.finish({**self.notes(plan), **bos, **self._block_errors(source)})

    def _block_errors(self, source: Streamed) -> dict[str, Any]:
        """Return the record's note on the error of every finished block; empty if no text is read."""
        sample = drift.sample_windows(self.calibration, source.tokenizer, embedding_rows(source.model))
        if sample is None:
            return {}
        outputs = []
        for dense in (True, False):
            source.bring_rest()
            outputs.append(drift.block_outputs(source.model, sample, source, dense=dense))
        return drift.error_note(*outputs)

    def _replace_all(self, source: Streamed, plan: Any, windows: Tensor | None) -> None:
        """Walk over the blocks of `source` and replace the weight of every linear."""
        dead = DeadInputs(self.on_dead)

        def prepare(groups: list[Group], block: Callable[[], list[Tensor]]) -> None:
            source.noted |= self.prepare(groups, block)

        def compress(linears: list[Linear], statistic: Statistic | None) -> Iterator[Tensor]:
            weights = self.replace_group(linears, statistic, plan)
            for linear in linears:
                if statistic:
                    dead.log(linear.name, statistic.dead())
                weight = next(weights)
                if isinstance(weight, Quantized):
                    source.quantized[linear.name] = weight
                    weight = weight.checked(linear.weight)
                yield weight

        options: dict[str, Any] = {}
        if self.statistic:
            assert isinstance(self.calibration, Calibration)
            source.bring_rest()
            options = {
                "statistic": self.statistic,
                "sequential": self.calibration.sequential,
                "batch_size": self.calibration.batch_size,
                "prepare": prepare if self.prepares else None,
            }
        walk(
            source.model,
            compress,
            by_group=True,
            windows=windows,
            **options,
            ignore=self.ignore,
            label=source.artifact,
            home=source,
        )

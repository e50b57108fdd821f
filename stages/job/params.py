"""The whole of `params.yaml` as one strict schema.

A method is its settings class: the unions below are the registry, so a misspelt method is answered with the
legal names. This file names every method and counts for no artifact (see `stages.core.identity`): adding a
method makes no old recipe run again.
"""

from typing import Annotated, Any, get_args

from pydantic import Field

from stages.controls.candidates import Floor, Noise
from stages.core.run import Run
from stages.core.schema import RECIPES, Candidate, Recipe, Slug, Strict
from stages.evaluation.graded import GradedSuite
from stages.evaluation.perplexity import PerplexitySuite
from stages.evaluation.stock import BenchmarkSuite
from stages.evaluation.suite import Suite
from stages.job.sentences import tag
from stages.profiling.speed import Profile
from stages.pruning.depth.depth import Depth
from stages.pruning.magnitude import Magnitude
from stages.pruning.random import Random
from stages.pruning.resp import RESP
from stages.pruning.shape.heads import Heads
from stages.pruning.shape.reflective import ReflectiveStructures
from stages.pruning.shape.width import Width
from stages.pruning.sparsegpt import SparseGPT
from stages.pruning.stepwise import Stepwise
from stages.pruning.wanda import Wanda
from stages.quantization.awq import AWQ
from stages.quantization.fp8 import FP8
from stages.quantization.gptq import GPTQ
from stages.quantization.hqq import HQQ
from stages.quantization.mxfp4 import MXFP4
from stages.quantization.nf4 import NF4
from stages.quantization.nvfp4 import NVFP4
from stages.quantization.rtn import RTN
from stages.quantization.smoothquant import SmoothQuant
from stages.recovery.eco import ECO
from stages.recovery.full import Full
from stages.recovery.lora import LoRA
from stages.recovery.qat import QAT
from stages.reporting.judging import Report
from stages.reporting.study import Study
from stages.sources.benchmark import Benchmark
from stages.sources.conversations import Conversations
from stages.sources.gguf import Gguf
from stages.sources.graded.arithmetic import Arithmetic
from stages.sources.graded.brackets import Brackets
from stages.sources.graded.classification import Classification
from stages.sources.graded.instructions import Instructions
from stages.sources.graded.letters import Letters
from stages.sources.graded.sorting import Sorting
from stages.sources.mix import Mix
from stages.sources.published import Published
from stages.sources.safetensors import Safetensors
from stages.sources.task import OwnTask
from stages.sources.text import Text
from stages.teaching.answers import Answers
from stages.teaching.logits import Logits
from stages.teaching.teaching import Teaching

AnyModel = Annotated[Gguf | Safetensors | Published, Field(discriminator="format")]
AnyDataset = Annotated[
    Text
    | Mix
    | Arithmetic
    | Brackets
    | Letters
    | Sorting
    | Classification
    | Instructions
    | Benchmark
    | OwnTask
    | Conversations,
    Field(discriminator="kind"),
]
Prune = Annotated[
    Magnitude | Wanda | SparseGPT | Random | Width | Heads | Depth | Stepwise | RESP | ReflectiveStructures,
    Field(discriminator="method"),
]
Quantize = Annotated[
    RTN | GPTQ | AWQ | SmoothQuant | HQQ | NF4 | FP8 | MXFP4 | NVFP4, Field(discriminator="method")
]
Finetune = Annotated[LoRA | Full | QAT | ECO, Field(discriminator="method")]
Teach = Annotated[Answers | Logits, Field(discriminator="method")]
REGISTRY: dict[str, tuple[type[Strict], ...]] = {
    section: get_args(get_args(union)[0])
    for section, union in {
        "models": AnyModel, "datasets": AnyDataset, "prune": Prune, "quantize": Quantize, "teach": Teach,
        "finetune": Finetune,
    }.items()
}  # fmt: skip
"""The settings classes of each section whose entries differ by method, kind or format."""


class Suites(Strict):
    """Section `suites`: how every candidate is scored."""

    datasets: dict[Slug, Slug] = Field(default_factory=dict)
    """The data set that a suite scores, by suite; a suite that is not named scores that of its own name."""
    perplexity: dict[Slug, PerplexitySuite] = Field(default_factory=dict)
    graded: dict[Slug, GradedSuite] = Field(default_factory=dict)
    benchmark: dict[Slug, BenchmarkSuite] = Field(default_factory=dict)

    def dataset_of(self, suite: str) -> str:
        """Return the data set that a suite scores."""
        return self.datasets.get(suite, suite)

    def by_kind(self) -> dict[str, dict[str, Suite]]:
        """Return the suites by kind and name."""
        return {kind: getattr(self, kind) for kind in SUITES}

    def by_name(self) -> dict[str, Suite]:
        """Return all suites by name."""
        return {name: suite for suites in self.by_kind().values() for name, suite in suites.items()}


class Evaluate(Strict):
    """Section `evaluate`."""

    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]
    """The models that every suite scores."""


class Params(Strict):
    """All of params.yaml; sections with a default may be left out."""

    run: Run
    """Where and how everything is computed."""
    models: dict[Slug, AnyModel]
    """The bases: `base/<model>` as a source or candidate."""
    datasets: dict[Slug, AnyDataset]
    """Texts, tasks and conversations: calibrated on, trained on, scored."""
    prune: dict[Slug, Prune] = Field(default_factory=dict)
    """Recipes that remove weights, or whole neurons, heads or blocks."""
    quantize: dict[Slug, Quantize] = Field(default_factory=dict)
    """Recipes that store weights in fewer bits."""
    teach: dict[Slug, Teach] = Field(default_factory=dict)
    """Data sets that a model writes for others to learn from: its answers or its logits."""
    finetune: dict[Slug, Finetune] = Field(default_factory=dict)
    """Recipes that train a model to recover what compression cost."""
    noise: dict[Slug, Noise] = Field(default_factory=dict)
    """Copies of a model that are evaluated under other conditions: their difference is noise."""
    floor: dict[Slug, Floor] = Field(default_factory=dict)
    """Responders without knowledge, as candidates of their own."""
    suites: Suites
    """How every candidate is scored."""
    evaluate: Evaluate
    """Which models are scored."""
    profile: Annotated[Profile, Field(examples=[{"candidates": []}])]
    """Which models are timed. With none write `profile: {candidates: []}`: DVC's `vars` stand for sections
    that are left out, but not for a list."""
    report: Report = Report()
    """How differences are judged."""
    studies: dict[Slug, Study] = Field(default_factory=dict)
    """Published claims put to the test."""

    def recipes(self) -> dict[str, Recipe | Noise | Floor | Teaching]:
        """Return every recipe that has a source, by `<stage>/<recipe>`."""
        return {
            f"{stage}/{name}": recipe for stage in RECIPES for name, recipe in getattr(self, stage).items()
        }

    def evaluations(self) -> list[str]:
        """Return every `<candidate>/<suite>` to be evaluated."""
        return [
            f"{candidate}/{suite}"
            for candidate in self.evaluate.candidates
            for suite in self.suites.by_name()
        ]

    def base_of(self, artifact: str) -> str | None:
        """Return the model an artifact descends from; None if a source is missing or there is a cycle."""
        first = self.lineage(artifact)[-1]
        base = first.removeprefix("base/")
        return base if first.startswith("base/") and base in self.models else None

    def lineage(self, artifact: str) -> list[str]:
        """Return an artifact and its ancestors, nearest first, up to one that is missing or comes again."""
        chain = [artifact]
        while (recipe := self._recipe(chain[-1])) and recipe.source not in chain:
            chain.append(recipe.source)
        return chain

    def _recipe(self, artifact: str) -> Recipe | Noise | Floor | Teaching | None:
        """Return the recipe `<stage>/<recipe>`, as `recipes` has it; None if there is none."""
        stage, _, name = artifact.partition("/")
        return getattr(self, stage).get(name) if stage in RECIPES else None


def methods(section: str) -> dict[str, type[Any]]:
    """Return the settings classes of a section by the word that picks each."""
    return {tag(config): config for config in REGISTRY[section]}


SUITES: dict[str, type[Suite]] = {
    name: get_args(field.annotation)[1] for name, field in Suites.model_fields.items() if name != "datasets"
}
"""The settings class of each kind of suite."""

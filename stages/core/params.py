"""The whole of `params.yaml` as one strict schema, and every reason to refuse it, told at once.

A method is its config class: the unions below are the registry, so a misspelt method is answered with
the legal ones. This file names every method and therefore is no dependency of any stage in `dvc.yaml`:
adding a method must not make old recipes run again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError
from ruamel.yaml import YAML  # what DVC reads the file with; other parsers see other numbers in it
from ruamel.yaml.error import YAMLError

from stages.core import problems
from stages.core.errors import Refusal
from stages.core.problems import entries
from stages.core.run import Dtype, Run
from stages.core.schema import Base, Candidate, Recipe, Slug, Source, Strict
from stages.core.sentences import follows, sentence, tag
from stages.download.arithmetic import Arithmetic
from stages.download.benchmark import Benchmark
from stages.download.brackets import Brackets
from stages.download.classification import Classification
from stages.download.gguf import Gguf
from stages.download.instructions import Instructions
from stages.download.letters import Letters
from stages.download.safetensors import Safetensors
from stages.download.sorting import Sorting
from stages.download.text import Text
from stages.evaluate.benchmark import BenchmarkSuite
from stages.evaluate.graded import GradedSuite
from stages.evaluate.perplexity import PerplexitySuite
from stages.finetune.eco import ECO
from stages.finetune.full import Full
from stages.finetune.lora import LoRA
from stages.finetune.qat import QAT
from stages.profile.speed import Profile
from stages.prune.depth import Depth
from stages.prune.heads import Heads
from stages.prune.magnitude import Magnitude
from stages.prune.random import Random
from stages.prune.resp import RESP
from stages.prune.sparsegpt import SparseGPT
from stages.prune.stepwise import Stepwise
from stages.prune.wanda import Wanda
from stages.prune.width import Width
from stages.quantize.awq import AWQ
from stages.quantize.fp8 import FP8
from stages.quantize.gptq import GPTQ
from stages.quantize.hqq import HQQ
from stages.quantize.mxfp4 import MXFP4
from stages.quantize.nf4 import NF4
from stages.quantize.nvfp4 import NVFP4
from stages.quantize.rtn import RTN
from stages.quantize.smoothquant import SmoothQuant
from stages.teach.answers import Answers
from stages.teach.logits import Logits
from stages.teach.options import Teaching

PARAMS = Path("params.yaml")

Model = Annotated[Gguf | Safetensors, Field(discriminator="format")]
Dataset = Annotated[
    Text | Arithmetic | Brackets | Letters | Sorting | Classification | Instructions | Benchmark,
    Field(discriminator="kind"),
]
Prune = Annotated[
    Magnitude | Wanda | SparseGPT | Random | Width | Heads | Depth | Stepwise | RESP,
    Field(discriminator="method"),
]
Quantize = Annotated[
    RTN | GPTQ | AWQ | SmoothQuant | HQQ | NF4 | FP8 | MXFP4 | NVFP4, Field(discriminator="method")
]
Finetune = Annotated[LoRA | Full | QAT | ECO, Field(discriminator="method")]
Teach = Annotated[Answers | Logits, Field(discriminator="method")]
METHODS: dict[str, tuple[type[Recipe], ...]] = {
    "prune": get_args(get_args(Prune)[0]),
    "quantize": get_args(get_args(Quantize)[0]),
    "finetune": get_args(get_args(Finetune)[0]),
}


class Noise(Strict):
    """A candidate that is its source again, evaluated at another batch size or in another dtype."""

    source: Source
    batch_size: Annotated[int, Field(ge=1)] | None = None
    dtype: Dtype | None = None


class Floor(Strict):
    """A candidate that knows nothing: what it scores is no achievement (see `stages.evaluate.null`)."""

    source: Base
    """The model whose tokenizer and chat template it is asked with."""
    responder: Literal[
        "uniform",
        "longest-choice",
        "empty",
        "dot",
        "repeat",
        "echo",
        "shuffled",
        "previous",
        "random-words",
    ]


class Suites(Strict):
    """What candidates are asked, by kind. A suite scores the data set of its own name."""

    perplexity: dict[Slug, PerplexitySuite]
    graded: dict[Slug, GradedSuite]
    benchmark: dict[Slug, BenchmarkSuite]

    def by_name(self) -> dict[str, PerplexitySuite | GradedSuite | BenchmarkSuite]:
        """Every suite of every kind."""
        return {**self.perplexity, **self.graded, **self.benchmark}


class Evaluate(Strict):
    """Which models every suite is asked of."""

    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]


class Params(Strict):
    """All of params.yaml."""

    run: Run
    models: dict[Slug, Model]
    datasets: dict[Slug, Dataset]
    prune: dict[Slug, Prune]
    quantize: dict[Slug, Quantize]
    teach: dict[Slug, Teach]
    finetune: dict[Slug, Finetune]
    noise: dict[Slug, Noise]
    floor: dict[Slug, Floor]
    suites: Suites
    evaluate: Evaluate
    profile: Profile

    def recipes(self) -> dict[str, Recipe | Noise | Floor | Teaching]:
        """Every recipe that has a source, as `<stage>/<recipe>`."""
        stages: dict[str, Mapping[str, Recipe | Noise | Floor | Teaching]] = {
            "prune": self.prune,
            "quantize": self.quantize,
            "teach": self.teach,
            "finetune": self.finetune,
            "noise": self.noise,
            "floor": self.floor,
        }
        return {
            f"{stage}/{name}": recipe for stage, found in stages.items() for name, recipe in found.items()
        }

    def evaluations(self) -> list[str]:
        """Every `<candidate>/<suite>` there is a result of."""
        return [
            f"{candidate}/{suite}"
            for candidate in self.evaluate.candidates
            for suite in self.suites.by_name()
        ]

    def unmade(self, stage: str, name: str) -> list[str]:
        """What a recipe is made from and is not there yet, each with the command that makes it.

        Args:
            name: of a recipe of `stage`; `<candidate>/<suite>` for evaluate, a candidate for
                profile. Other stages read no recipe's source, or tell themselves what they miss.
        """
        from stages.core.artifact import MODELS, RECORD
        from stages.core.calibration import DATASETS

        if stage == "evaluate":
            source, suite = name.rsplit("/", 1)
            datasets = [suite]
        elif stage == "profile":
            source, datasets = name, []
        elif recipe := self.recipes().get(f"{stage}/{name}"):
            source = recipe.source
            texts = (getattr(recipe, field, None) for field in ("calibration", "train"))
            named = [getattr(text, "dataset", "none") for text in (*texts, recipe)]
            datasets = [name for name in named if name != "none"]
        else:
            return []
        download = "python -m stages.download"
        section, key = source.split("/")
        maker = f"{download} {source}" if section == "base" else f"dvc repro {section}@{key}"
        makers = {MODELS / source / RECORD: maker}
        makers |= {
            DATASETS / one / "dataset.json": f"dvc repro teach@{one}"
            if one in self.teach
            else f"{download} datasets/{one}"
            for one in datasets
        }
        return [
            f"there is no {path.parent} yet (`{maker}` makes it)"
            for path, maker in makers.items()
            if not path.exists()
        ]

    def base_of(self, artifact: str) -> str | None:
        """The model an artifact descends from; None where a source is missing or its lineage is a cycle."""
        first = self._lineage(artifact)[-1]
        base = first.removeprefix("base/")
        return base if first.startswith("base/") and base in self.models else None

    def reshaped(self, artifact: str) -> bool:
        """Whether an artifact has linears of other widths than the model it descends from."""
        recipes = self.recipes()
        return any(getattr(recipes.get(one), "reshapes", False) for one in self._lineage(artifact))

    def _lineage(self, artifact: str) -> list[str]:
        """An artifact and what it descends from, up to where that is missing or comes again."""
        recipes, found = self.recipes(), [artifact]
        while found[-1] in recipes and (source := recipes[found[-1]].source) not in found:
            found.append(source)
        return found


def load(path: Path = PARAMS) -> Params:
    """Read and check `path`.

    Raises:
        Refusal: one line an offender, all of them.
    """
    if not path.exists():
        raise Refusal(f"there is no {path} here; run from the root of a prunequant project.")
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not UTF-8 at byte {error.start}; save it in that encoding.") from None
    except YAMLError as error:
        raise Refusal(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise Refusal(
            f"{path} must hold sections ({', '.join(Params.model_fields)}), it holds {type(raw).__name__}."
        )
    return validate(raw, str(path))


def validate(raw: dict[str, Any], where: str = "params.yaml") -> Params:
    """`Params` from parsed YAML.

    Raises:
        Refusal: one line an offender, all of them.
    """
    offenders: list[str] = []
    broken: set[str] = set()
    rest = raw
    try:
        params = _parsed(raw)
    except ValidationError as error:
        offenders += [sentence(details, Params) for details in error.errors() if not follows(details)]
        rest, broken = entries.sound(raw, [details["loc"] for details in error.errors()])
        params = _parsed(rest)
    offenders += [*entries.of_lineage(raw), *problems.between(params, broken)]
    if offenders:
        lines = "\n".join(f"  - {line}" for line in dict.fromkeys(offenders))
        raise Refusal(f"{where} has {len(set(offenders))} problem(s), nothing was run:\n{lines}")
    return params


def load_verified(path: Path = PARAMS) -> Params:
    """`load`, and `path:` sources held against their hashes; once a run, as it reads all they hold.

    Raises:
        Refusal: one line an offender, all of them.
    """
    params = load(path)
    if changed := list(problems.changed_paths(params)):
        lines = "\n".join(f"  - {line}" for line in changed)
        raise Refusal(f"{path} has {len(changed)} problem(s), nothing was run:\n{lines}")
    return params


def _parsed(raw: dict[str, Any]) -> Params:
    return Params.model_validate(_tuples(raw))


def _tuples(value: Any) -> Any:
    """YAML's lists as tuples, which is what the strict, frozen schema holds."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def methods(section: str) -> dict[str, type[Any]]:
    """The config classes of a section that have a method, by its name; the contract test reads them."""
    return {tag(config): config for config in METHODS[section]}

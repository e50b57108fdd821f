"""A graded task asked by likelihood among choices, by generation, or twice: by both, on the same items.

Both readouts see the same prompt: the few-shot examples in a fixed order, then the question. With thinking
there is generation alone. A generated answer ends with its line. The data set says how an answer is read and
how long it may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from stages.core.backend import FORCED, LIKELIHOOD, unserved
from stages.core.errors import Refusal
from stages.core.files import DATASET, DATASETS, read_json
from stages.core.lazy import pd
from stages.corpus.readings import is_right, read_answer
from stages.evaluation.floors import with_floors
from stages.evaluation.lm_tasks import load_tasks, run_tasks
from stages.evaluation.suite import Penalties, Suite, SuiteRows
from stages.evaluation.task_rows import rows_of
from stages.evaluation.thinking.settings import Thinking
from stages.sources.graded.items import STEPS, GradedData

if TYPE_CHECKING:
    from lm_eval.api.model import LM

ReadoutName: TypeAlias = Literal["likelihood", "generation"]

_VERSION = 1
METRICS: dict[ReadoutName, str] = {"likelihood": "acc", "generation": "exact_match"}
"""The metric of each readout."""


class GradedSuite(Suite):
    """Few-shot questions with a known answer, asked in one readout or in both."""

    scores = GradedData

    shots: Annotated[int, Field(ge=0)]
    readouts: Annotated[tuple[ReadoutName, ...], Field(min_length=1)] | None = None
    """Whether items are asked by likelihood, by generation or both; null: both, or generation alone where
    thinking or the backend leaves nothing else."""
    chat_template: bool = False
    penalties: Penalties | None = None
    """Penalties on generated answers; null: none, whatever the checkpoint's generation_config.json says."""
    thinking: Thinking | None = None
    """Think before each answer, by generation only; see `stages.evaluation.thinking.scaling`."""
    chain_of_thought: bool = False
    """Each shot shows its steps as the thinking before its answer (2201.11903). Needs `thinking`."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.readouts and len(set(self.readouts)) < len(self.readouts):
            raise ValueError(f"readouts names one twice: {', '.join(self.readouts)}")
        if self.thinking and self.readouts and self.readouts != ("generation",):
            raise ValueError(
                "thinking comes before a generated answer; set readouts to [generation], or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _thinks(self) -> Self:
        if self.chain_of_thought and not (self.thinking and self.shots):
            raise ValueError(
                "chain_of_thought shows steps between the words of thinking in each shot; set thinking and "
                "at least 1 shot, or leave it out"
            )
        return self

    def refuses_vllm(self) -> str | None:
        """Say why vLLM cannot generate the answers; None if it can."""
        if self.readouts and "likelihood" in self.readouts:
            return LIKELIHOOD
        return FORCED if self.thinking else unserved(self.penalties.options() if self.penalties else {})

    def asked(self) -> tuple[ReadoutName, ...]:
        """Return the readouts in which items are asked."""
        if self.readouts:
            return self.readouts
        return ("generation",) if self.thinking or self.backend == "vllm" else ("likelihood", "generation")

    def evaluate(self, lm: LM, name: str, seed: int) -> SuiteRows:
        """Score overall and by difficulty; a sample row is one item in one readout."""
        # vLLM as the noise of a suite that transformers answers in both readouts
        asked = ("generation",) if getattr(lm, "generates_only", False) else self.asked()
        tasks = load_tasks(self.tasks(name, asked))
        if self.chain_of_thought:
            self._check_steps(lm, name)

        def ask(lm: LM) -> SuiteRows:
            if self.thinking:
                from stages.evaluation.thinking import scaling  # imports lm-eval, which takes seconds

                reading = _answer(name)["reading"]
                return scaling.score_draws(
                    lm,
                    self.thinking,
                    tasks,
                    name=name,
                    limit=None,
                    chat_template=self.chat_template,
                    seed=seed,
                    penalties=self.penalties.options() if self.penalties else {},
                    read=lambda _, response: read_answer(reading, response),
                )
            result = run_tasks(lm, tasks, limit=None, chat_template=self.chat_template, seed=seed)
            parts = [
                rows_of(
                    result,
                    [_task_name(name, readout)],
                    lm=lm,
                    name=name,
                    readout=readout,
                    chat_template=self.chat_template,
                    seed=seed,
                    metrics=(METRICS[readout],),
                )
                for readout in asked
            ]
            return [row for scores, _ in parts for row in scores], [
                row for _, samples in parts for row in samples
            ]

        return with_floors(lm, seed, ask)

    def tasks(self, name: str, asked: Iterable[ReadoutName]) -> list[dict[str, Any]]:
        """Return lm-eval's configs for the data set `name`, one for each readout in `asked`."""
        import datasets

        splits = {
            split: datasets.Dataset.from_list(
                pd.read_parquet(DATASETS / name / f"{split}.parquet").map(_plain).to_dict("records")
            )
            for split in ("fewshot", "test")
        }
        return [self._config(name, readout, splits) for readout in asked]

    def _config(self, name: str, readout: ReadoutName, splits: dict[str, Any]) -> dict[str, Any]:
        """Return lm-eval's config for one readout."""
        config: dict[str, Any] = {
            "task": _task_name(name, readout),
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "fewshot",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": self.shots,
            "doc_to_text": "{{question}}",
            "target_delimiter": " ",
            "fewshot_delimiter": "\n",
            "metadata": {"version": _VERSION},
            "metric_list": [{"metric": METRICS[readout], "aggregation": "mean", "higher_is_better": True}],
        }
        if readout == "likelihood":
            return config | {
                "output_type": "multiple_choice",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{gold}}",
            }
        answer = _answer(name)

        def score(item: dict[str, Any], responses: list[str]) -> dict[str, float]:
            return {"exact_match": float(is_right(answer["reading"], responses[0], item))}

        if self.chain_of_thought:
            worked = {"doc_to_target": self._worked, "target_delimiter": ""}
            config["fewshot_config"] = config["fewshot_config"] | worked
        return config | {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {
                "until": ["\n"],
                "do_sample": False,
                "max_gen_toks": answer["tokens"],
                **(self.penalties.options() if self.penalties else {}),
            },
            "process_results": score,
        }

    def _worked(self, example: Mapping[Any, Any]) -> str:
        """Return what follows an example's question: its steps, as thoughts that ended, and its answer."""
        assert self.thinking
        words = self.thinking
        return f"{words.begin}{example[STEPS]}{words.end}{words.request(ended=True)} {example['answer']}"

    def _check_steps(self, lm: LM, name: str) -> None:
        """Refuse shots whose steps the model would not see whole, as thinking that ends where they end."""
        assert self.thinking
        for example in (
            pd.read_parquet(DATASETS / name / "fewshot.parquet").head(self.shots).to_dict("records")
        ):
            if self.thinking.end in example[STEPS]:
                raise Refusal(
                    f"suite {name}: thinking.end is {self.thinking.end!r}, which occurs in the steps "
                    f"{example[STEPS]!r}; choose an end that does not."
                )
            if not self.chat_template:
                continue
            worked = self._worked(example)
            turns = [("user", example["question"]), ("assistant", worked), ("user", example["question"])]
            shown = lm.apply_chat_template([{"role": role, "content": text} for role, text in turns])
            if worked not in shown:
                raise Refusal(
                    f"suite {name}: the model's chat template does not keep {worked!r} in an earlier turn, "
                    "so shots would not show thinking as it is asked for; set chat_template: false, or other "
                    "words for thinking's begin and end."
                )


def _task_name(name: str, readout: str) -> str:
    return f"{name}-{readout}"


def _answer(name: str) -> dict[str, Any]:
    """Return how answers are read (`reading`), and how long they may be (`tokens`)."""
    answer: dict[str, Any] = read_json(DATASETS / name / DATASET)["answer"]
    return answer


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value

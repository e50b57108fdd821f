"""A graded task asked twice: by likelihood among choices, and by generation, on the same items.

Both readouts see the same prompt, the few-shot examples in their fixed order and then the question. A
generated answer ends with its line; how it is read and how long it may be, the data set says.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.files import DATASETS
from stages.core.lazy import pd
from stages.corpus.readings import read, right
from stages.evaluation.lm_tasks import Rows, load_tasks, rows, run_tasks, with_floors
from stages.evaluation.suite import Suite
from stages.evaluation.thinking.settings import Thinking
from stages.sources.graded.items import Graded

if TYPE_CHECKING:
    from lm_eval.api.model import LM

VERSION = 1


class GradedSuite(Suite):
    """Few-shot questions with a known answer, in both readouts."""

    scores = Graded

    shots: Annotated[int, Field(ge=0)]
    chat_template: bool = False
    thinking: Thinking | None = None
    """Think before each answer, which is then generated only; see `stages.evaluation.thinking.scaling`."""

    def evaluate(self, lm: LM, name: str, seed: int) -> tuple[Rows, Rows]:
        """Score rows, overall and by difficulty, and one sample row an item and readout."""
        tasks = load_tasks(self.tasks(name))

        def answered(lm: LM) -> tuple[Rows, Rows]:
            if self.thinking:
                from stages.evaluation.thinking import scaling  # imports lm-eval, which takes seconds

                reading = _answer(name)["reading"]
                return scaling.evaluate(
                    lm,
                    self.thinking,
                    tasks[1:],
                    name=name,
                    limit=None,
                    chat_template=self.chat_template,
                    seed=seed,
                    read=lambda _, response: read(reading, response),
                )
            result = run_tasks(lm, tasks, limit=None, chat_template=self.chat_template, seed=seed)
            scores: Rows = []
            samples: Rows = []
            for readout, metric in (("likelihood", "acc"), ("generation", "exact_match")):
                found = rows(
                    result,
                    [f"{name}-{readout}"],
                    lm=lm,
                    name=name,
                    readout=readout,
                    chat_template=self.chat_template,
                    seed=seed,
                    metrics=(metric,),
                )
                scores += found[0]
                samples += found[1]
            return scores, samples

        return with_floors(lm, seed, answered)

    def tasks(self, name: str) -> list[dict[str, Any]]:
        """lm-eval's configs of both readouts of the data set `name`."""
        splits = {
            split: pd.read_parquet(DATASETS / name / f"{split}.parquet") for split in ("fewshot", "test")
        }
        return [self._task(name, readout, splits) for readout in ("likelihood", "generation")]

    def _task(self, name: str, readout: str, splits: dict[str, pd.DataFrame]) -> dict[str, Any]:
        """lm-eval's config of one readout."""
        import datasets

        made = {
            split: datasets.Dataset.from_list(frame.map(_plain).to_dict("records"))
            for split, frame in splits.items()
        }
        config: dict[str, Any] = {
            "task": f"{name}-{readout}",
            "custom_dataset": lambda **_: made,
            "test_split": "test",
            "fewshot_split": "fewshot",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": self.shots,
            "doc_to_text": "{{question}}",
            "target_delimiter": " ",
            "fewshot_delimiter": "\n",
            "metadata": {"version": VERSION},
        }
        if readout == "likelihood":
            return config | {
                "output_type": "multiple_choice",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        answer = _answer(name)

        def scored(item: dict[str, Any], responses: list[str]) -> dict[str, float]:
            return {"exact_match": float(right(answer["reading"], responses[0], item))}

        return config | {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": answer["tokens"]},
            "process_results": scored,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }


def _answer(name: str) -> dict[str, Any]:
    """How answers are read, and how long they may be."""
    found: dict[str, Any] = json.loads((DATASETS / name / "dataset.json").read_text())["answer"]
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value

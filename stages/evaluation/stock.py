"""lm-eval's stock tasks and groups of them by name, on data the download stage has brought in.

A task is used as lm-eval ships it but for where its data comes from: the parquet files of
`data/datasets/<suite>` take the hub's place, so nothing is fetched. A split the task names and the data
lacks (lm-eval asks for a training split even at zero shots) is left out. What a task makes of its documents
before it asks them, such as GPQA's shuffled choices, is made once: lm-eval makes it anew for the questions
and for the scores, and the two must not differ. The few tasks lm-eval lacks are in `stages/evaluate/tasks`.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.core.identity import beside
from stages.evaluation import programs as execution
from stages.evaluation.lm_tasks import Rows, load_tasks, of_data, rows, run_tasks, with_floors
from stages.evaluation.suite import Suite
from stages.evaluation.thinking.settings import Thinking
from stages.sources.benchmark import Benchmark

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks._index import Entry

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
TASKS = beside(__file__, "tasks")


class BenchmarkSuite(Suite):
    """One stock task of lm-eval or one group, each task limited to its first `limit` items (null: all)."""

    scores = Benchmark

    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    shots: Annotated[int, Field(ge=0)] | None = None
    """null: as many as the task's own config says."""
    limit: Annotated[int, Field(ge=1)] | None = None
    max_gen_toks: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; null: as the task says."""
    chat_template: bool = False
    allow_code_execution: bool = False
    """Run the programs that the model writes, which is how HumanEval and MBPP score them."""
    thinking: Thinking | None = None
    """Think before each answer of a task that is answered by generation; see `stages.evaluation.thinking.scaling`."""

    def evaluate(self, lm: "LM", name: str, seed: int) -> tuple[Rows, Rows]:
        """Score rows of every metric the task has a number of, and one sample row an item and metric.

        Raises:
            Refusal: lm-eval has no such task, its data lacks what it needs, or it would run programs.
        """
        import langdetect

        folder = DATASETS / name
        if (folder / "nltk_data").exists():
            import nltk

            nltk.data.path.insert(0, str((folder / "nltk_data").resolve()))
        langdetect.DetectorFactory.seed = seed  # IFEval asks it which language an answer is in
        with execution.in_place_of_the_hub(), _nothing_fetched(name):
            stock = dict(self.stock())
            tasks = load_tasks([self._task(task, config, folder, seed) for task, config in stock.items()])
        _fit(tasks, lm, name)

        def answered(lm: "LM") -> tuple[Rows, Rows]:
            if self.thinking:
                from stages.evaluation.thinking import scaling  # imports lm-eval, which takes seconds

                return scaling.evaluate(
                    lm,
                    self.thinking,
                    tasks,
                    name=self.task,
                    limit=self.limit,
                    chat_template=self.chat_template,
                    seed=seed,
                    execute_code=self.allow_code_execution,
                )
            result = run_tasks(
                lm,
                tasks,
                limit=self.limit,
                chat_template=self.chat_template,
                seed=seed,
                execute_code=self.allow_code_execution,
            )
            kind = result["configs"][next(iter(stock))]["output_type"]
            return rows(
                result,
                list(stock),
                lm=lm,
                name=self.task,
                readout="generation" if kind == "generate_until" else "likelihood",
                chat_template=self.chat_template,
                seed=seed,
                by_size=self._by_size(),
            )

        scores, samples = with_floors(lm, seed, answered)
        if not scores:
            raise Refusal(f"{self.task} scores no single item; only tasks that do are served.")
        return scores, samples

    def stock(self, name: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """The name and config of each of lm-eval's tasks that the suite's task or group comes to.

        Args:
            name: of a part of the group; None is all of it.
        """
        from lm_eval.tasks._index import Kind
        from lm_eval.tasks._yaml_loader import load_yaml

        name = name or self.task
        entry = all_tasks().get(name)
        if entry is None:
            raise Refusal(f"lm-eval has no task {name!r}; `lm-eval ls tasks` prints those it has.")
        if entry.kind is Kind.TAG:
            if name == self.task:
                raise Refusal(
                    f"{name} is a tag, which has no score of its own; name one of its tasks: "
                    f"{', '.join(sorted(entry.tags))}."
                )
            for task in sorted(entry.tags):
                yield from self.stock(task)
            return
        # lm-eval gives no public way to change a stock task before it asks the hub for its data.
        if (entry.cfg or {}).get("unsafe_code") and not self.allow_code_execution:
            raise Refusal(
                f"{name} runs the programs that the model writes; set allow_code_execution: true where this "
                "machine may do that."
            )
        config = load_yaml(entry.yaml_path)
        if entry.kind is Kind.GROUP:
            for member in config["task"]:
                if not isinstance(member, str):
                    raise Refusal(f"{name} defines tasks within the group, which is not served.")
                yield from self.stock(member)
        elif "class" in config:
            raise Refusal(f"{name} is a program of lm-eval's rather than a task in YAML; it is not served.")
        else:
            yield name, config

    def _by_size(self) -> bool:
        """Whether a group's items count alike, rather than its tasks; lm-eval's own choice where it says."""
        listed = (all_tasks()[self.task].cfg or {}).get("aggregate_metric_list") or [{}]
        first = listed[0] if isinstance(listed, list) else listed
        return bool(first.get("weight_by_size", True))

    def _task(self, task: str, config: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
        """A stock task's config with its data taken from `folder`, or from that of its config in it.

        Raises:
            Refusal: the data has no split the task can be scored on, or none to take its examples from.
        """
        if (inner := folder / str(config.get("dataset_name"))).is_dir():
            folder = inner
        files = {file.stem: str(file) for file in sorted(folder.glob("*.parquet"))}
        has = ", ".join(files) or "none"
        scored = config.get("test_split") or config.get("validation_split")
        examples = config.get("fewshot_split") or config.get("training_split")
        for split in SPLITS:
            if config.get(split) not in files:
                config[split] = None
        if not (config["test_split"] or config["validation_split"]):
            raise Refusal(f"{folder} has the splits {has}; {task} is scored on {scored}.")
        if self.shots is not None:
            config["num_fewshot"] = self.shots
        written = (config.get("fewshot_config") or {}).get("samples")
        if config.get("num_fewshot") and not (written or examples in files):
            raise Refusal(
                f"{folder} has the splits {has}; {task} takes its {config['num_fewshot']} examples from "
                f"{examples or 'the items it is scored on'}; bring that split in, or set shots: 0."
            )
        if self.max_gen_toks is not None:
            config["generation_kwargs"] = {
                **(config.get("generation_kwargs") or {}),
                "max_gen_toks": self.max_gen_toks,
            }
        for structure in ("tag", "group", "task_list"):
            config.pop(structure, None)
        made = _documents(task, files, config, seed)
        if not written and examples and (wanted := config.get("num_fewshot")):
            spare = len(made[examples]) - (examples == (config["test_split"] or config["validation_split"]))
            if wanted > spare:
                raise Refusal(
                    f"{files[examples]} has {max(spare, 0)} examples for an item of {task}, which takes "
                    f"{wanted}; bring more in, or set fewer shots."
                )
        return config | {"task": task, "custom_dataset": lambda **_: made}


def _fit(tasks: "Sequence[Task]", lm: "LM", name: str) -> None:
    """Refuse answers that are as long as all that `lm` reads.

    Args:
        name: the suite's.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    reads: int = lm.max_length
    for task in tasks:
        if task.OUTPUT_TYPE != "generate_until":
            continue
        longest = normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"]
        if longest >= reads:
            raise Refusal(
                f"{task.task_name} asks for answers of up to {longest} tokens, and the model reads {reads}, "
                f"the question included; set suites.benchmark.{name}.max_gen_toks to less, such as "
                f"{reads // 2}."
            )


def _documents(task: str, files: dict[str, str], config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The splits a task reads, its own `process_docs` (taken out of `config`) done to each.

    Raises:
        Refusal: a file is no parquet or has no rows, or `process_docs` cannot do with its columns.
    """
    import datasets
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    process = config.pop("process_docs", None)
    wanted = dict.fromkeys(config[split] for split in SPLITS if config[split])
    made = {}
    for split in wanted:
        try:
            if not pq.read_metadata(files[split]).num_rows:
                raise Refusal(f"{files[split]} has no item for {task}; bring in a split that has.")
            made[split] = datasets.Dataset.from_parquet(files[split])
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
            raise Refusal(
                f"{files[split]} cannot be read as parquet: {error.__cause__ or error}; bring it in again."
            ) from error
    if process is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with _uncached(), of_data(task, made):
            made = {split: process(documents) for split, documents in made.items()}
    for split, documents in made.items():
        if not len(documents):
            raise Refusal(f"{task} keeps no item of {files[split]}; bring in a split of which it does.")
    return made


@contextlib.contextmanager
def _nothing_fetched(name: str) -> Iterator[None]:
    """Refuse what a task would have `nltk` fetch.

    Args:
        name: the suite's.
    """
    import nltk

    def download(resource: str, *_: Any, **__: Any) -> None:
        raise Refusal(
            f"{name} needs nltk's {resource}, which is not here; set datasets.{name}.nltk_data to a zip of "
            "it, as docs/benchmarks.md shows."
        )

    with mock.patch.object(nltk, "download", download):
        yield


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """No results of an earlier `map`, which may have been drawn with another seed."""
    import datasets

    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


@cache
def all_tasks() -> "dict[str, Entry]":
    """All tasks there are; reading lm-eval's takes ten seconds."""
    from lm_eval.tasks import TaskManager

    index: dict[str, Entry] = TaskManager(include_path=str(TASKS)).task_index
    return index

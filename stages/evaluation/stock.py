"""lm-eval's stock tasks, and groups of them, on data that the download stage has fetched.

A task is used as lm-eval ships it except for its data: it reads the parquet files of `data/datasets/<suite>`,
so nothing is fetched from the hub. A split that the task names and the data lacks is left out, as lm-eval
asks for a training split even at zero shots. Random choices of a task, such as the order of GPQA's options,
are drawn once: lm-eval would draw again between asking and scoring, and the two must agree. A few tasks that
lm-eval lacks are in `stages/evaluation/tasks`; a user's own are data sets (see `stages.sources.task`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.backend import FORCED, LIKELIHOOD, unserved
from stages.core.errors import Refusal
from stages.core.files import DATASET, DATASETS, read_json
from stages.core.identity import beside
from stages.core.reading import reason
from stages.evaluation import offline
from stages.evaluation.floors import with_floors
from stages.evaluation.lm_tasks import load_tasks, run_tasks
from stages.evaluation.splits import SPLIT_KEYS, load_splits
from stages.evaluation.suite import Penalties, Suite, SuiteRows
from stages.evaluation.task_rows import rows_of
from stages.evaluation.thinking.settings import Thinking
from stages.sources.benchmark import Benchmark
from stages.sources.task import FOLDER, read_task

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks._index import Entry

OURS = beside(__file__, "tasks")
"""The tasks that lm-eval lacks."""


class BenchmarkSuite(Suite):
    """A stock task of lm-eval, a group of them, or a user's own task, such as `path:my_tasks/qa.yaml`.

    Each task is cut to its first `limit` items (null: all).
    """

    scores = Benchmark

    task: Annotated[str, Field(pattern=r"^(?:(?:path|hub|pypi):.+|[A-Za-z0-9][A-Za-z0-9_.-]*)$")]
    shots: Annotated[int, Field(ge=0)] | None = None
    """null: the number in the task's own config."""
    limit: Annotated[int, Field(ge=1)] | None = None
    max_gen_toks: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; null: the task's own."""
    chat_template: bool = False
    allow_code_execution: bool = False
    """Run the programs that the model writes, which is how HumanEval and MBPP score them."""
    penalties: Penalties | None = None
    """Penalties on generated answers; null: none, whatever the checkpoint's generation_config.json says."""
    thinking: Thinking | None = None
    """Think before each generated answer; see `stages.evaluation.thinking.scaling`."""

    @property
    def own(self) -> bool:
        """Whether the task is a YAML file and none of lm-eval's."""
        return ":" in self.task

    def evaluate(self, lm: LM, name: str, seed: int) -> SuiteRows:
        """Score every metric of the task that is a number; a sample row is one item's metric.

        Raises:
            Refusal: lm-eval has no such task, the data does not fit it, or it would run programs.
        """
        offline.fetch_nothing()
        folder = DATASETS / name
        if (nltk_data := folder / "nltk_data").exists():
            offline.add_nltk_data(nltk_data)
        stock = dict([own_task(folder)] if self.own else self.stock())
        task_name = next(iter(stock)) if self.own else self.task
        tasks = load_tasks([self._config(task, config, folder, seed) for task, config in stock.items()])
        generating = [task for task in tasks if task.OUTPUT_TYPE == "generate_until"]
        options = self._generation()
        if options and not generating:
            raise Refusal(
                f"suites.benchmark.{name} sets {', '.join(options)}, but {self.task} is answered by "
                "likelihood; leave it out."
            )
        if langdetect := sys.modules.get("langdetect"):  # IFEval asks it for the language of an answer
            langdetect.DetectorFactory.seed = seed
        _check_lengths(tasks, lm, name)

        def ask(lm: LM) -> SuiteRows:
            if self.thinking:
                from stages.evaluation.thinking import scaling  # imports lm-eval, which takes seconds

                return scaling.score_draws(
                    lm,
                    self.thinking,
                    tasks,
                    name=task_name,
                    limit=self.limit,
                    chat_template=self.chat_template,
                    seed=seed,
                    penalties=self.penalties.options() if self.penalties else {},
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
            return rows_of(
                result,
                list(stock),
                lm=lm,
                name=task_name,
                readout="generation" if kind == "generate_until" else "likelihood",
                chat_template=self.chat_template,
                seed=seed,
                by_size=self._by_size(),
            )

        scores, samples = with_floors(lm, seed, ask)
        if not scores:
            raise Refusal(f"{self.task} has no score of a single item; choose a task that has.")
        return scores, samples

    def refuses_vllm(self) -> str | None:
        """Say why vLLM cannot answer the task or all tasks of the group; None if it can.

        lm-eval's index of tasks is read, which takes ten seconds.
        """
        if self.thinking:
            return FORCED
        reasons = [
            unserved((config.get("generation_kwargs") or {}) | self._generation())
            if config.get("output_type", "generate_until") == "generate_until"
            else LIKELIHOOD
            for _, config in self.stock(functions=False)
        ]
        return next(filter(None, reasons), None)

    def stock(
        self, name: str | None = None, *, functions: bool = True
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and config of each of lm-eval's tasks behind the suite's task or group.

        Args:
            name: a part of the group; None is the whole.
            functions: whether to import the functions that configs name.
        """
        from lm_eval.tasks._index import Kind
        from lm_eval.tasks._yaml_loader import load_yaml

        name = name or self.task
        entry = all_tasks().get(name)
        if entry is None:
            raise Refusal(f"lm-eval has no task {name!r}; `lm-eval ls tasks` lists its tasks.")
        if entry.kind is Kind.TAG:
            if name == self.task:
                raise Refusal(
                    f"{name} is a tag, which has no score of its own; name one of its tasks: "
                    f"{', '.join(sorted(entry.tags))}."
                )
            for task in sorted(entry.tags):
                yield from self.stock(task, functions=functions)
            return
        # lm-eval gives no public way to change a stock task before it asks the hub for its data.
        self._check_programs(name, entry.cfg or {})
        config = load_yaml(entry.yaml_path, resolve_func=functions)
        if entry.kind is Kind.GROUP:
            for member in config["task"]:
                if not isinstance(member, str):
                    raise Refusal(
                        f"{name} defines tasks inside the group, which is not supported; name one of its "
                        "tasks."
                    )
                yield from self.stock(member, functions=functions)
        elif "class" in config:
            raise Refusal(f"{name} is a Python class of lm-eval; choose a task defined in YAML.")
        else:
            yield name, config

    def _generation(self) -> dict[str, float]:
        """Return the suite's own options of generation."""
        length = {} if self.max_gen_toks is None else {"max_gen_toks": self.max_gen_toks}
        return length | (self.penalties.options() if self.penalties else {})

    def _check_programs(self, name: str, config: dict[str, Any]) -> None:
        """Refuse a task that runs the programs that the model writes, unless the suite allows it."""
        if config.get("unsafe_code") and not self.allow_code_execution:
            raise Refusal(
                f"{name} runs the programs that the model writes; set allow_code_execution: true if this "
                "machine may run them."
            )

    def _by_size(self) -> bool:
        """Tell whether a group's items count equally, rather than its tasks, as lm-eval's config says."""
        if self.own:
            return True
        listed = (all_tasks()[self.task].cfg or {}).get("aggregate_metric_list") or [{}]
        first = listed[0] if isinstance(listed, list) else listed
        return bool(first.get("weight_by_size", True))

    def _config(self, task: str, config: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
        """Return a stock task's config with its data taken from `folder`, or its subfolder `dataset_name`.

        Raises:
            Refusal: the data has no split to score the task on, or none to take its examples from.
        """
        if (inner := folder / str(config.get("dataset_name"))).is_dir():
            folder = inner
        files = {file.stem: str(file) for file in sorted(folder.glob("*.parquet"))}
        has = ", ".join(files) or "none"
        scored = config.get("test_split") or config.get("validation_split")
        examples = config.get("fewshot_split") or config.get("training_split")
        for key in SPLIT_KEYS:
            if config.get(key) not in files:
                config[key] = None
        if not (config["test_split"] or config["validation_split"]):
            raise Refusal(
                f"{folder} has the splits {has}, but {task} is scored on {scored}; download that split."
            )
        if self.shots is not None:
            config["num_fewshot"] = self.shots
        written = (config.get("fewshot_config") or {}).get("samples")
        if config.get("num_fewshot") and not (written or examples in files):
            raise Refusal(
                f"{folder} has the splits {has}, but {task} takes its {config['num_fewshot']} examples from "
                f"{examples or 'the items it is scored on'}; download that split, or set shots: 0."
            )
        if options := self._generation():
            config["generation_kwargs"] = (config.get("generation_kwargs") or {}) | options
        self._check_programs(task, config)
        for structure in ("tag", "group", "task_list"):
            config.pop(structure, None)
        splits = load_splits(task, files, config, seed)
        if not written and examples and (shots := config.get("num_fewshot")):
            spare = len(splits[examples]) - (examples == (config["test_split"] or config["validation_split"]))
            if shots > spare:
                raise Refusal(
                    f"{files[examples]} has {max(spare, 0)} examples for an item of {task}, which takes "
                    f"{shots}; download more, or set fewer shots."
                )
        return config | {"task": task, "custom_dataset": lambda **_: splits}


def own_task(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the name and config of the task in the data set at `folder`.

    Raises:
        Refusal: it runs code that is not allowed, or names code that cannot be imported.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    settings = read_json(folder / DATASET)
    root, yaml = folder / FOLDER, settings["yaml"]
    read_task(root, yaml)  # refuses code that is not allowed
    try:
        config = load_yaml(root / yaml)
    except Exception as error:  # its code is imported, which may do anything
        raise Refusal(
            f"{settings['source']}/{yaml} names code that cannot be imported ({reason(error)}); put its "
            "module beside the YAML."
        ) from error
    for key in ("dataset_name", "dataset_kwargs"):  # its data is read from `folder`
        config.pop(key, None)
    return config["task"], config


def _check_lengths(tasks: Sequence[Task], lm: LM, name: str) -> None:
    """Refuse answers so long that they leave no room for the prompt.

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
                f"{task.task_name} asks for answers of up to {longest} tokens, but the model reads {reads}, "
                f"prompt included; set suites.benchmark.{name}.max_gen_toks to less, such as {reads // 2}."
            )


@cache
def all_tasks() -> dict[str, Entry]:
    """Return the index of all tasks; indexing lm-eval's takes ten seconds."""
    from lm_eval.tasks import TaskManager

    index: dict[str, Entry] = TaskManager(include_path=str(OURS)).task_index
    return index

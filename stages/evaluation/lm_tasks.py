"""Load and run lm-eval's tasks, our own and its stock ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import mock

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task


def load_tasks(configs: Sequence[dict[str, Any]]) -> list[Task]:
    """Make lm-eval's tasks from whole configs; their requests are built once, however many models are asked.

    With a chat template requests are built for each model, as the template is its own.

    Raises:
        Refusal: a task cannot use its data; building its requests raises it too.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # indexing the stock tasks takes ten seconds
    tasks = []
    for config in configs:
        splits = config["custom_dataset"]()
        with refused_data(config["task"], splits):
            task = manager.load([config])["tasks"][config["task"]]
        task.build_all_requests = _build_once(task, splits)
        tasks.append(task)
    return tasks


@contextmanager
def refused_data(task: str, splits: Mapping[str, Any]) -> Iterator[None]:
    """Turn any error raised inside into a Refusal that names the task and the columns of its data."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        columns = dict.fromkeys(column for split in splits.values() for column in split.column_names)
        raise Refusal(
            f"{task} cannot use this data, whose columns are {', '.join(columns)}: {type(error).__name__}: "
            f"{error}. Use the data set and config that the task is made for."
        ) from error


def _build_once(task: Task, splits: Mapping[str, Any]) -> Callable[..., None]:
    """Return a replacement for `task.build_all_requests` that reuses the requests it built."""
    build, built = task.build_all_requests, False

    def build_or_reset(*, apply_chat_template: bool, chat_template: Any = None, **options: Any) -> None:
        nonlocal built

        def template(*turns: Any, **settings: Any) -> Any:
            try:
                return chat_template(*turns, **settings)
            except Exception as error:  # the data is not at fault
                raise Refusal(
                    f"the model's chat template fails on the prompts of {task.task_name}: {error}; set "
                    "chat_template: false."
                ) from error

        if apply_chat_template or not built:
            with refused_data(task.task_name, splits):
                build(
                    apply_chat_template=apply_chat_template,
                    chat_template=chat_template and template,
                    **options,
                )
                for doc in {request.doc_id: request.doc for request in task.instances}.values():
                    task.doc_to_target(doc)  # lm-eval would only fail on it after all answers
            built = True
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    return build_or_reset


def run_tasks(
    lm: LM,
    tasks: Sequence[Task],
    *,
    limit: int | None,
    chat_template: bool,
    seed: int,
    execute_code: bool = False,
) -> dict[str, Any]:
    """Return lm-eval's own result of `tasks`, every sample logged and all seeds fixed.

    Tasks run one after the other, so that prompts asked together share their task's common prefix, and a
    finished task need not be asked again.
    """
    from lm_eval import evaluator, utils
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    result: dict[str, Any] = {}
    with (
        # Listing the machine's packages, compilers and commit takes seconds, and nobody reads it here.
        mock.patch.object(evaluator, "add_env_info", lambda _: None),
        mock.patch.object(evaluator, "get_git_commit_hash", lambda: None),
        # lm-eval compiles a task's templates for each item, which is most of the time that prompts take.
        mock.patch.object(utils.env, "from_string", cache(utils.env.from_string)),
    ):
        for task in tasks:
            parts = evaluator.simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                random_seed=seed,
                numpy_random_seed=seed % 2**32,  # numpy takes 32 bits
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=execute_code,
            )
            for part, by_task in parts.items():
                if isinstance(by_task, dict):
                    result.setdefault(part, {}).update(by_task)
    return result

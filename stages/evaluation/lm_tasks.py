"""lm-eval's results as the project's rows, for our own tasks and its stock ones alike."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

Rows = list[dict[str, Any]]


def load_tasks(configs: Sequence[dict[str, Any]]) -> "list[Task]":
    """lm-eval's tasks of whole configs. Their requests are built once, however many models are asked.

    A chat template is the model's own, so with one they are built for each.

    Raises:
        Refusal: a task makes no questions of its data; requests raise it too where they are built.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # indexing its stock tasks takes ten seconds
    tasks = []
    for config in configs:
        splits = config["custom_dataset"]()
        with of_data(config["task"], splits):
            task = manager.load([config])["tasks"][config["task"]]
        task.build_all_requests = _built_once(task, splits)
        tasks.append(task)
    return tasks


@contextlib.contextmanager
def of_data(task: str, splits: Mapping[str, Any]) -> Iterator[None]:
    """What goes wrong in here is refused by name, with the data that `task` was to be asked on."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        columns = dict.fromkeys(column for split in splits.values() for column in split.column_names)
        raise Refusal(
            f"{task} cannot be asked on this data, whose columns are {', '.join(columns)}: "
            f"{type(error).__name__}: {error}; bring in the data set and config that the task is made for."
        ) from error


def _built_once(task: "Task", splits: Mapping[str, Any]) -> Callable[..., None]:
    build, built = task.build_all_requests, False

    def build_or_clear(*, apply_chat_template: bool, chat_template: Any = None, **options: Any) -> None:
        nonlocal built

        def around(*turns: Any, **asked: Any) -> Any:
            try:
                return chat_template(*turns, **asked)
            except Exception as error:  # which is no matter of the data
                raise Refusal(
                    f"the model's chat template cannot be put around {task.task_name}: {error}; set "
                    "chat_template: false."
                ) from error

        if apply_chat_template or not built:
            with of_data(task.task_name, splits):
                build(
                    apply_chat_template=apply_chat_template,
                    chat_template=chat_template and around,
                    **options,
                )
                for doc in {request.doc_id: request.doc for request in task.instances}.values():
                    task.doc_to_target(doc)  # lm-eval asks for it when all is answered
            built = True
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    return build_or_clear


def run_tasks(
    lm: "LM",
    tasks: "Sequence[Task]",
    *,
    limit: int | None,
    chat_template: bool,
    seed: int,
    execute_code: bool = False,
) -> dict[str, Any]:
    """lm-eval's own result of `tasks`, every sample logged, all seeds fixed.

    One task after the other: what the prompts of a task share is then shared by all that are asked at once,
    and a task that is finished need not be asked again.
    """
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    result: dict[str, Any] = {}
    for task in tasks:
        with _environment_untold(), _templates_compiled_once():
            found = evaluator.simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                random_seed=seed,
                numpy_random_seed=seed % 2**32,  # all that numpy takes
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=execute_code,
            )
        for part, by_task in found.items():
            if isinstance(by_task, dict):
                result.setdefault(part, {}).update(by_task)
    return result


@contextlib.contextmanager
def _environment_untold() -> Iterator[None]:
    """lm-eval lists the machine's packages and compilers at each call: seconds, for what none reads here."""
    from lm_eval import evaluator

    told = evaluator.add_env_info
    evaluator.add_env_info = lambda _: None
    try:
        yield
    finally:
        evaluator.add_env_info = told


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates anew for each item, which is most of the time that prompts take."""
    from lm_eval import utils

    compile_template = utils.env.from_string
    utils.env.from_string = cache(compile_template)
    try:
        yield
    finally:
        utils.env.from_string = compile_template


def rows(
    result: Mapping[str, Any],
    tasks: Sequence[str],
    *,
    lm: "LM",
    name: str,
    readout: str,
    chat_template: bool,
    seed: int,
    metrics: tuple[str, ...] | None = None,
    by_size: bool = True,
) -> tuple[Rows, Rows]:
    """Score rows, overall and by `difficulty`, and sample rows of one task or of a group's tasks.

    The difficulty of an item is its document's; in a group it is the task it is of. `floor` is one over the
    number of choices, on average, where the right one of several is asked for, and not known elsewhere. A
    sample row's score is the metric of its item alone.

    Args:
        name: the task's name in our tables.
        readout: `likelihood` or `generation`.
        chat_template: whether the tokenizer's template was put around the prompt.
        metrics: which of the task's numeric per-item metrics to keep; None keeps all.
        by_size: whether the items of a group's tasks count alike; False: its tasks do.
    """
    config, first = result["configs"][tasks[0]], result["samples"][tasks[0]]
    filters = list(dict.fromkeys(sample["filter"] for sample in first))
    directions = result["higher_is_better"].get(tasks[0], {})
    chosen_from = config["output_type"] == "multiple_choice" and not config.get("process_results")
    template = "none"
    if chat_template:
        text = lm.tokenizer.chat_template or ""
        template = hashlib.sha256(text.encode()).hexdigest()
    base = {
        "task": name,
        "readout": readout,
    }
    about = {
        "task_version": str(result["versions"].get(tasks[0])),
        "template": template,
        "shots": result["n-shot"].get(tasks[0], config.get("num_fewshot") or 0),
        "seed": seed,
    }
    scores, samples = [], []
    for kept in filters:
        asked = [
            (task, item)
            for task in tasks
            for item in sorted(result["samples"][task], key=lambda item: item["doc_id"])
            if item["filter"] == kept
        ]
        items = [item for _, item in asked]
        levels = [
            task if len(tasks) > 1 else str(item["doc"].get("difficulty", "all")) for task, item in asked
        ]
        for metric in items[0]["metrics"]:
            if metrics is not None and metric not in metrics:
                continue
            values = [_number(item[metric], metric) for item in items]
            if any(value is None for value in values):
                continue
            label = metric if kept == "none" or len(filters) == 1 else f"{metric} ({kept})"
            for level in dict.fromkeys(["all", *levels]):
                chosen = [i for i in range(len(items)) if level in ("all", levels[i])]
                picked = [float(values[i]) for i in chosen]  # type: ignore[arg-type]
                mean = math.fsum(picked) / len(picked)
                value = mean
                # The task's own aggregate need not be a mean over items (IFEval counts instructions).
                if level in tasks or (level == "all" and len(tasks) == 1):
                    own = level if level in tasks else tasks[0]
                    value = float(result["results"][own][f"{metric},{kept}"])
                elif len(tasks) > 1 and not by_size:
                    parts = [float(result["results"][task][f"{metric},{kept}"]) for task in tasks]
                    value = math.fsum(parts) / len(parts)
                spread = math.fsum((one - mean) ** 2 for one in picked)
                chances = [1 / len(items[i]["filtered_resps"]) for i in chosen]
                scores.append(
                    {
                        **base,
                        **about,
                        "prompt_hash": _joined(items[i]["prompt_hash"] for i in chosen),
                        "difficulty": level,
                        "metric": label,
                        "value": value,
                        "floor": math.fsum(chances) / len(chances)
                        if chosen_from and metric.startswith("acc")
                        else None,
                        "stderr": math.sqrt(spread / (len(picked) - 1) / len(picked))
                        if len(picked) > 1 and math.isclose(value, mean)
                        else None,
                        "num_items": len(picked),
                        "higher_is_better": directions.get(metric, True),
                    }
                )
            samples += [
                {
                    **base,
                    **_answer(item, readout, lm),
                    "doc_id": item["doc_id"] if len(tasks) == 1 else i,
                    "difficulty": levels[i],
                    "prompt_hash": item["prompt_hash"],
                    "target": str(item["target"]),
                    "metric": label,
                    "score": float(values[i]),  # type: ignore[arg-type]
                }
                for i, item in enumerate(items)
            ]
    return scores, samples


def with_floors(lm: "LM", seed: int, answered: Callable[["LM"], tuple[Rows, Rows]]) -> tuple[Rows, Rows]:
    """The rows of `lm`, each score's `floor` the best that a null responder gets on the same items.

    Chance is known where one of several choices is asked for. There a null responder raises floors only if
    over all items it is two standard errors above chance: the best of a few draws on the few items of a level
    would always seem to be. What has no highest score, such as a perplexity, has no floor.

    Args:
        answered: asks a model, or what stands for one, and gives its score and sample rows.
    """
    from stages.evaluation import null, requests

    scores, samples = answered(lm)
    if isinstance(lm, requests.Recorder):  # whose scores nobody reads
        return scores, samples
    key = ("task", "readout", "metric", "difficulty")
    found: dict[tuple[Any, ...], dict[str, Any]] = {tuple(row[name] for name in key): row for row in scores}
    for responder in null.for_readouts({row["readout"] for row in scores}, lm.tokenizer, seed):
        answers = answered(responder)[0]
        beyond = {
            tuple(answer[name] for name in key[:-1])
            for answer in answers
            if answer["difficulty"] == "all"
            and (answer["floor"] is None or answer["value"] > answer["floor"] + 2 * (answer["stderr"] or 0))
        }
        for answer in answers:
            row = found[tuple(answer[name] for name in key)]
            if row["higher_is_better"] and tuple(answer[name] for name in key[:-1]) in beyond:
                row["floor"] = max(answer["value"], -math.inf if row["floor"] is None else row["floor"])
    return scores, samples


UNITS: dict[str, Callable[[float], float]] = {
    "word_perplexity": math.exp,
    "byte_perplexity": math.exp,
    "bits_per_byte": lambda nats: nats / math.log(2),
}
"""What metrics of whole texts make of nats a word or byte."""


def _number(value: Any, metric: str) -> float | None:
    if isinstance(value, list) and value and all(isinstance(part, bool) for part in value):
        return sum(value) / len(value)  # IFEval gives one truth value an instruction
    if isinstance(value, tuple) and metric in UNITS:
        likelihood, length = value
        return UNITS[metric](-likelihood / length)
    return float(value) if isinstance(value, bool | int | float) else None


def _joined(hashes: Any) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _answer(item: Mapping[str, Any], readout: str, lm: "LM") -> dict[str, Any]:
    if readout == "generation":
        response = str(item["resps"][0][0])
        return {
            "response": response,
            "generated_tokens": len(lm.tok_encode(response, add_special_tokens=False)),
        }
    answers = item["filtered_resps"]  # of a whole text the likelihood alone
    likelihoods = [float(one[0]) if isinstance(one, tuple | list) else float(one) for one in answers]
    return {
        "response": json.dumps(max(range(len(likelihoods)), key=likelihoods.__getitem__)),
        "log_likelihoods": likelihoods,
    }

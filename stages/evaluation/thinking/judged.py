"""How a task judges an answer: which of its metrics say right or wrong, and what of an answer it compares.

Neither may depend on who answers, or the scores of two models, or of a model and its floor, would not be of
the same things. So a task's metrics are tried on made-up answers to its own items: what gives part of an
item, or a list, is by degrees, whatever the models happen to be given.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Reading = Callable[[Mapping[str, Any], str], str]
"""What of an answer to an item is compared; "" is no answer."""
TRIED = 8
"""Items that made-up answers are given to."""
NO_ANSWER = ("[invalid]", "[invalidanswer]")
"""What lm-eval's filters and tasks put where they find no answer."""


def right_or_wrong(tasks: "Sequence[Task]") -> tuple[str, ...]:
    """The metrics that are 0 or 1 for an item, in all of `tasks`, which are answered by generation."""
    found = [_right_or_wrong(task) for task in tasks]
    return tuple(metric for metric in found[0] if all(metric in other for other in found))


def _right_or_wrong(task: "Task") -> list[str]:
    from lm_eval.api.instance import Instance

    made = []
    for doc in islice(task.eval_docs, TRIED):
        target = task.doc_to_target(doc)
        gold = " ".join(map(str, target)) if isinstance(target, list) else str(target)
        words = gold.split()
        for text in ("", gold, " ".join(words[: -(-len(words) // 2)]), f"{gold} and so on"):
            instance = Instance("generate_until", doc, ("", {}), 0, (task.task_name, 0, 1))
            instance.resps = [text] * (task.config.repeats or 1)
            made.append(instance)
    for one in task._filters:
        one.apply(made)
    values: dict[str, list[Any]] = {}
    for instance in made:
        for answer in instance.filtered_resps.values():
            for metric, value in task.process_results(instance.doc, [answer]).items():
                values.setdefault(metric, []).append(value)
    return [metric for metric, seen in values.items() if all(map(_is_truth, seen))]


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def compared(task: "Task") -> Reading:
    """What `task` compares of an answer, after its filters, with what is right.

    A task with an `is_equiv` of its own, such as those of mathematics, is asked what it would compare: the
    last box or what stands between dollars, in the one way that it writes a number. Others compare the text
    but for what their exact match ignores.
    """
    process = getattr(task.config, "process_results", None)
    told = getattr(process, "__globals__", {})
    if "is_equiv" in told:
        return lambda doc, answer: _as_equiv(process, told, doc, answer)  # type: ignore[arg-type]
    listed = [one for one in task.config.metric_list or [] if one.get("metric") == "exact_match"]
    ignored = listed[0] if listed and not callable(process) else {}
    return lambda _, answer: _as_matched(ignored, answer)


def _as_equiv(
    process: Callable[[Any, list[str]], Any], told: dict[str, Any], doc: Mapping[str, Any], answer: str
) -> str:
    asked: list[Any] = []

    def is_equiv(one: Any, _: Any, *__: Any, **___: Any) -> bool:
        asked.append(one)
        return False

    with mock.patch.dict(told, is_equiv=is_equiv):
        process(doc, [answer])
    found = str(asked[0]).strip() if asked and asked[0] is not None else ""
    try:
        found = told["strip_string"](found) if "strip_string" in told else found
    except Exception:  # it asserts what it expects of an answer; the task compares the rest as it stands
        return found
    return "" if found in NO_ANSWER else found


def _as_matched(ignored: Mapping[str, Any], answer: str) -> str:
    if answer.strip() in NO_ANSWER:
        return ""
    for pattern in ignored.get("regexes_to_ignore") or ():
        answer = re.sub(pattern, "", answer)
    for option, characters in (
        ("ignore_punctuation", string.punctuation),
        ("ignore_numbers", string.digits),
    ):
        answer = answer.translate(str.maketrans("", "", characters)) if ignored.get(option) else answer
    return (answer.lower() if ignored.get("ignore_case") else answer).strip()

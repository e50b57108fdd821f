"""How a task judges an answer: which of its metrics are right or wrong, and which part of it is compared.

Neither may depend on who answers, or the scores of two models, or of a model and its floor, would measure
different things. So a task's metrics are tried out on made-up answers to its own items: a metric that is ever
anything but 0 or 1 does not count, whatever the models happen to answer.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from stages.core.lazy import mock

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Reading = Callable[[Mapping[str, Any], str], str]
"""(item, answer) -> the part of the answer that is compared; "" for no answer."""
_TRIED = 8
"""Items that made-up answers are given to."""
_NO_ANSWER = ("[invalid]", "[invalidanswer]")
"""The text that lm-eval's filters and tasks return when they find no answer."""


def right_or_wrong(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return the metrics that are 0 or 1 for an item in all of `tasks`, which are answered by generation."""
    first, *others = [_right_or_wrong(task) for task in tasks]
    return tuple(metric for metric in first if all(metric in other for other in others))


def _right_or_wrong(task: Task) -> list[str]:
    from lm_eval.api.instance import Instance

    tried = []
    for doc in islice(task.eval_docs, _TRIED):
        target = task.doc_to_target(doc)
        gold = " ".join(map(str, target)) if isinstance(target, list) else str(target)
        words = gold.split()
        for text in ("", gold, " ".join(words[: -(-len(words) // 2)]), f"{gold} and so on"):
            instance = Instance("generate_until", doc, ("", {}), 0, (task.task_name, 0, 1))
            instance.resps = [text] * (task.config.repeats or 1)
            tried.append(instance)
    for answer_filter in task._filters:
        answer_filter.apply(tried)
    values: dict[str, list[Any]] = {}
    for instance in tried:
        for answer in instance.filtered_resps.values():
            for metric, value in task.process_results(instance.doc, [answer]).items():
                values.setdefault(metric, []).append(value)
    return [metric for metric, seen in values.items() if all(map(_is_truth, seen))]


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def compared(task: Task) -> Reading:
    """Return how to read the part of a filtered answer that `task` compares with the right answer.

    A task with its own `is_equiv`, as in mathematics, is run to see the text it passes there: the last box or
    the text between dollars, with numbers in one notation. Other tasks compare the text, without the
    characters that their exact match ignores.
    """
    process = getattr(task.config, "process_results", None)
    scope = getattr(process, "__globals__", {})
    if "is_equiv" in scope:
        return lambda doc, answer: _as_equiv(process, scope, doc, answer)  # type: ignore[arg-type]
    listed = [metric for metric in task.config.metric_list or [] if metric.get("metric") == "exact_match"]
    ignored = listed[0] if listed and not callable(process) else {}
    return lambda _, answer: _as_matched(ignored, answer)


def _as_equiv(
    process: Callable[[Any, list[str]], Any], scope: dict[str, Any], doc: Mapping[str, Any], answer: str
) -> str:
    """Return the text that `process` passes to `is_equiv`, both of which live in `scope`."""
    passed: list[Any] = []

    def is_equiv(text: Any, _: Any, *__: Any, **___: Any) -> bool:
        passed.append(text)
        return False

    with mock.patch.dict(scope, is_equiv=is_equiv):
        process(doc, [answer])
    text = str(passed[0]).strip() if passed and passed[0] is not None else ""
    try:
        text = scope["strip_string"](text) if "strip_string" in scope else text
    except Exception:  # it asserts a form that this answer lacks; the task then compares the text as it is
        return text
    return "" if text in _NO_ANSWER else text


def _as_matched(ignored: Mapping[str, Any], answer: str) -> str:
    """Return the answer without the characters that exact match ignores."""
    if answer.strip() in _NO_ANSWER:
        return ""
    for pattern in ignored.get("regexes_to_ignore") or ():
        answer = re.sub(pattern, "", answer)
    for option, characters in (
        ("ignore_punctuation", string.punctuation),
        ("ignore_numbers", string.digits),
    ):
        answer = answer.translate(str.maketrans("", "", characters)) if ignored.get(option) else answer
    return (answer.lower() if ignored.get("ignore_case") else answer).strip()

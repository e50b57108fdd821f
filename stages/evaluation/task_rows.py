"""lm-eval's results as rows of the result tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core.files import text_sha256
from stages.core.tables import Sample, Score
from stages.corpus.bos import begun
from stages.evaluation.means import mean, standard_error
from stages.evaluation.suite import Penalties

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from stages.evaluation.suite import SuiteRows

_CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""lm-eval's metrics that are 1 if the right choice is taken, else 0."""
_SPECIAL = 8
"""The most tokens that a tokenizer adds around a text."""
_UNITS: dict[str, Callable[[float], float]] = {
    "word_perplexity": math.exp,
    "byte_perplexity": math.exp,
    "bits_per_byte": lambda nats: nats / math.log(2),
}
"""The metrics of whole texts, from nats a word or byte."""


@dataclass(frozen=True)
class FilteredAnswers:
    """The answers to a task, or to the tasks of a group, as one filter reads them."""

    filter: str
    """lm-eval's name of the filter, `none` where answers are not filtered."""
    column: str | None
    """The filter as the result tables have it: None if the task has a single filter."""
    items: list[Mapping[str, Any]]
    """lm-eval's samples, task by task in the order of the documents."""
    tasks: list[str]
    """The task of each item."""
    levels: list[str]
    """The difficulty of each item: that of its document, or in a group the name of its task."""
    doc_ids: list[int]
    """The number of each item: that of its document, or in a group its place."""

    def places(self, level: str) -> list[int]:
        """Return the places of the items of a level, or of all."""
        return [place for place, other in enumerate(self.levels) if level in ("all", other)]


def answers_of(result: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[FilteredAnswers]:
    """Yield the answers that lm-eval's result has for one task or for a group's tasks, filter by filter."""
    filters = list(dict.fromkeys(sample["filter"] for sample in result["samples"][tasks[0]]))
    for name in filters:
        owned = [
            (task, item)
            for task in tasks
            for item in sorted(result["samples"][task], key=lambda item: item["doc_id"])
            if item["filter"] == name
        ]
        items = [item for _, item in owned]
        owners = [task for task, _ in owned]
        group = len(tasks) > 1
        yield FilteredAnswers(
            filter=name,
            column=None if name == "none" or len(filters) == 1 else name,
            items=items,
            tasks=owners,
            levels=owners if group else [str(item["doc"].get("difficulty", "all")) for item in items],
            doc_ids=list(range(len(items))) if group else [item["doc_id"] for item in items],
        )


def rows_of(
    result: Mapping[str, Any],
    tasks: Sequence[str],
    *,
    lm: LM,
    name: str,
    readout: str,
    chat_template: bool,
    seed: int,
    metrics: tuple[str, ...] | None = None,
    by_size: bool = True,
) -> SuiteRows:
    """Return the rows of one task or of a group's tasks: scores overall and by difficulty, a sample an item.

    Args:
        name: the task's name in the result tables.
        readout: `likelihood` or `generation`.
        chat_template: whether prompts were put into the tokenizer's template.
        metrics: the per-item metrics to keep, of those that are numbers; None keeps all.
        by_size: whether a group's items count equally; False: its tasks do.
    """
    config = result["configs"][tasks[0]]
    facts = {
        "task_version": str(result["versions"].get(tasks[0])),
        "template": _template_hash(lm) if chat_template else "none",
        "shots": result["n-shot"].get(tasks[0], config.get("num_fewshot") or 0),
        "penalties": _penalties(config.get("generation_kwargs") or {}),
        "bos": _reads_bos(lm, result["samples"][tasks[0]][0], config["output_type"]),
        "seed": seed,
    }
    scores: list[Score] = []
    samples: list[Sample] = []
    for answers in answers_of(result, tasks):
        cut = [_is_cut(item, lm) for item in answers.items]
        for metric, values in _values(answers.items, metrics).items():
            columns = {"task": name, "readout": readout, "metric": metric, "filter": answers.column}
            scores += _scores(result, tasks, answers, metric, values, cut, by_size, columns | facts)
            samples += _samples(answers, values, lm, columns)
    return scores, samples


def _values(items: Sequence[Mapping[str, Any]], metrics: tuple[str, ...] | None) -> dict[str, list[float]]:
    """Return the values of every kept metric, an item each; metrics that are not numbers are left out."""
    values = {}
    for metric in items[0]["metrics"]:
        if metrics is None or metric in metrics:
            numbers = [_number(item[metric], metric) for item in items]
            known = [number for number in numbers if number is not None]
            if len(known) == len(items):
                values[metric] = known
    return values


def _scores(
    result: Mapping[str, Any],
    tasks: Sequence[str],
    answers: FilteredAnswers,
    metric: str,
    values: Sequence[float],
    cut: Sequence[bool],
    by_size: bool,
    columns: Mapping[str, Any],
) -> Iterator[Score]:
    """Yield the score rows of a metric, overall and level by level.

    The floor of choices is chance; `stages.evaluation.floors` raises it, and sets those of other metrics.
    """
    config = result["configs"][tasks[0]]
    of_choices = config["output_type"] == "multiple_choice" and not config.get("process_results")
    for level in dict.fromkeys(["all", *answers.levels]):
        chosen = answers.places(level)
        picked = [values[i] for i in chosen]
        average = mean(picked)
        value = average
        if aggregated := _aggregated(result, tasks, level, by_size):
            # The task's own aggregate need not be a mean over items: IFEval counts instructions.
            value = mean(
                [float(result["results"][task][f"{metric},{answers.filter}"]) for task in aggregated]
            )
        yield Score(
            **columns,
            cut_prompts=sum(cut[i] for i in chosen),
            prompt_hash=text_sha256("".join(answers.items[i]["prompt_hash"] for i in chosen)),
            difficulty=level,
            value=value,
            floor=mean([1 / len(answers.items[i]["filtered_resps"]) for i in chosen])
            if of_choices and metric in _CHOICE_METRICS
            else None,
            stderr=standard_error(picked) if math.isclose(value, average) else None,
            num_items=len(picked),
            higher_is_better=result["higher_is_better"].get(tasks[0], {}).get(metric, True),
        )


def _aggregated(result: Mapping[str, Any], tasks: Sequence[str], level: str, by_size: bool) -> Sequence[str]:
    """Return the tasks whose own aggregates make the score of a level; none where it is a mean over items."""
    if len(tasks) == 1:
        return tasks if level == "all" else ()
    if level != "all":
        return (level,)
    return () if by_size else tasks


def _samples(
    answers: FilteredAnswers, values: Sequence[float], lm: LM, columns: Mapping[str, Any]
) -> Iterator[Sample]:
    """Yield the sample rows of a metric, an item each."""
    for item, value, level, doc_id in zip(
        answers.items, values, answers.levels, answers.doc_ids, strict=True
    ):
        yield Sample(
            **columns,
            **_asked(item),
            **_response(item, columns["readout"], lm),
            doc_id=doc_id,
            difficulty=level,
            prompt_hash=item["prompt_hash"],
            target=str(item["target"]),
            score=value,
        )


def _asked(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a sample row that hold the question."""
    first = item["arguments"][0][0]
    pairs = [arguments for arguments in item["arguments"] if len(arguments) > 1]
    if not all(isinstance(continuation, str) for _, continuation in pairs):  # settings of a generation
        return {"prompt": first}
    pairs = pairs[: len(item["filtered_resps"])]  # some metrics ask for each choice without its question too
    same = all(context == first for context, _ in pairs)
    choices = [continuation if same else context + continuation for context, continuation in pairs]
    return {"prompt": first, "choices": choices or None}


def _response(item: Mapping[str, Any], readout: str, lm: LM) -> dict[str, Any]:
    """Return the columns of a sample row that hold the answer."""
    if readout == "generation":
        from lm_eval.models.utils import normalize_gen_kwargs

        from stages.evaluation.null import ANSWER_TOKENS  # imports lm-eval

        response = str(item["resps"][0][0])
        length = len(lm.tok_encode(response, add_special_tokens=False))
        longest = normalize_gen_kwargs(item["arguments"][0][1], ANSWER_TOKENS)["max_gen_toks"]
        return {"response": response, "generated_tokens": length, "cut": length >= longest}
    likelihoods = [
        float(answer[0]) if isinstance(answer, tuple | list) else float(answer)  # a whole text has no flag
        for answer in item["filtered_resps"]
    ]
    return {
        "response": json.dumps(max(range(len(likelihoods)), key=likelihoods.__getitem__)),
        "log_likelihoods": likelihoods,
    }


def _number(value: Any, metric: str) -> float | None:
    """Return one item's value of a metric as a number; None if it is not a number."""
    if isinstance(value, list) and value and all(isinstance(part, bool) for part in value):
        return sum(value) / len(value)  # IFEval has one truth value an instruction
    if isinstance(value, tuple) and metric in _UNITS:
        likelihood, length = value
        return _UNITS[metric](-likelihood / length)
    return float(value) if isinstance(value, bool | int | float) else None


def _is_cut(item: Mapping[str, Any], lm: LM) -> bool:
    """Tell whether lm-eval cuts the beginning off a prompt of an item, to fit what the model reads."""
    from lm_eval.models.utils import normalize_gen_kwargs

    from stages.evaluation.null import ANSWER_TOKENS  # imports lm-eval

    reads: int = lm.max_length
    for arguments in item["arguments"]:
        text, *rest = arguments
        if not rest:  # a whole text is read in windows
            continue
        if isinstance(rest[0], str):
            text, room = text + rest[0], reads + 1  # the last token is only predicted
        else:
            room = reads - normalize_gen_kwargs(rest[0], ANSWER_TOKENS)["max_gen_toks"]
        # A token has at least one byte, but for a few special ones.
        if len(text.encode()) + _SPECIAL > room and len(lm.tok_encode(text)) > room:
            return True
    return False


def _penalties(options: Mapping[str, Any]) -> str:
    """Return what lowers the odds of repetition, of the options of generation."""
    named = (name for name in Penalties.model_fields if name in options)
    return ", ".join(f"{name} {options[name]}" for name in named) or "none"


def _reads_bos(lm: LM, item: Mapping[str, Any], output_type: str) -> bool | None:
    """Tell whether the model reads BOS before a prompt; None for a responder without knowledge."""
    if not hasattr(lm, "prefix_token_id"):
        return None
    prompt = "" if output_type == "loglikelihood_rolling" else item["arguments"][0][0]
    return begun([lm.tok_encode(prompt) if prompt else [lm.prefix_token_id]], lm.tokenizer)


def _template_hash(lm: LM) -> str:
    return text_sha256(lm.tokenizer.chat_template or "")

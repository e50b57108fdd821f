"""Every request that a suite makes of a model, recorded call by call without a model.

A suite is run on a responder without knowledge that records each request. The costs of a suite follow from
them before it is run, and batch sizes are tried out on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from stages.evaluation.null import NullLM

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from stages.evaluation.suite import Suite
    from stages.evaluation.thinking.settings import Thinking


class Call(NamedTuple):
    """The requests of one call, and the method of the model that gets them."""

    method: str
    requests: list[Any]


class Recorder(NullLM):
    """Answer every request with nothing, and keep it in `calls`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__("uniform", "empty", tokenizer, seed)
        self.calls: list[Call] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Do as `NullLM` does."""
        self.calls.append(Call("loglikelihood", list(requests)))
        return super().loglikelihood(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Do as `NullLM` does."""
        self.calls.append(Call("loglikelihood_rolling", list(requests)))
        return super().loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Do as `NullLM` does."""
        self.calls.append(Call("generate_until", list(requests)))
        return super().generate_until(requests)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        self.calls.append(Call("_loglikelihood_tokens", list(requests)))
        return super()._loglikelihood_tokens(requests, **options)


def calls(suite: Suite, name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Call]:
    """Return all calls that suite `name` makes to a model with this tokenizer; its data set must exist."""
    recorder = Recorder(tokenizer, seed)
    suite.evaluate(recorder, name, seed)
    return recorder.calls


class Cost(NamedTuple):
    """How much a suite asks; `read` and `written` are tokens, with each thought and answer at its longest."""

    items: int
    requests: int
    read: int
    written: int


def cost(
    recorded: list[Call],
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    thinking: Thinking | None = None,
) -> Cost:
    """Add up recorded calls; each prompt counts whole, as often as it is asked.

    Args:
        longest: tokens of an answer where its task sets no bound.
        thinking: the suite's. A draw thinks once, at the largest budget, and answers at every budget.
    """
    items: set[Any] = set()
    read = written = 0
    for number, (method, requests) in enumerate(recorded):
        for place, request in enumerate(requests):
            if method == "_loglikelihood_tokens":
                items.add((number, place))
                read += len(request[1]) + len(request[2])
                continue
            # Both readouts of a graded item share its document.
            items.add((request.doc_id, repr(request.doc)))
            texts = request.args[:1] if method == "generate_until" else request.args
            prompt = len(tokenizer("".join(texts), add_special_tokens=False).input_ids)
            answer = request.args[1].get("max_gen_toks", longest) if method == "generate_until" else 0
            read += _read(prompt, thinking, tokenizer) if thinking else prompt
            written += _written(answer, thinking) if thinking else answer
    times = thinking.draws * len(thinking.budgets) if thinking else 1
    return Cost(len(items), times * sum(len(requests) for _, requests in recorded), read, written)


def _written(answer: int, thinking: Thinking) -> int:
    """Return the tokens generated for a prompt whose answer has at most `answer` tokens."""
    return thinking.draws * (thinking.budgets[-1] + len(thinking.budgets) * answer)


def _read(prompt: int, thinking: Thinking, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens read for a prompt: it and the words around thinking, for each stretch and answer."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    budgets, waits = thinking.budgets, thinking.waits
    start, waiting = prompt + count(thinking.begin), waits * count(thinking.wait)
    thoughts = (waits + 1) * start + waits * (budgets[-1] + waiting) if budgets[-1] else 0
    ends = start + waiting + count(thinking.end) + count(thinking.answer)
    return thinking.draws * (thoughts + len(budgets) * ends + sum(budgets))

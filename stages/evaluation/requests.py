"""What a suite asks of a model, without asking it: every request, in the calls it comes in.

A suite is run on a responder that knows nothing and writes down what it is asked. From that follow the
costs of a suite before it is run, and what a batch size is tried on.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from stages.evaluation.null import NullLM

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from stages.evaluation.thinking.settings import Thinking


class Call(NamedTuple):
    """Requests that come together, and the method of a model that they are put to."""

    method: str
    requests: list[Any]


class Recorder(NullLM):
    """An empty answer to everything, every call kept in `calls`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seed: int) -> None:
        super().__init__("uniform", "empty", tokenizer, seed)
        self.calls: list[Call] = []

    def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
        """As `NullLM` does."""
        self.calls.append(Call("loglikelihood", list(requests)))
        return super().loglikelihood(requests)

    def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
        """As `NullLM` does."""
        self.calls.append(Call("loglikelihood_rolling", list(requests)))
        return super().loglikelihood_rolling(requests)

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """As `NullLM` does."""
        self.calls.append(Call("generate_until", list(requests)))
        return super().generate_until(requests)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        self.calls.append(Call("_loglikelihood_tokens", list(requests)))
        return super()._loglikelihood_tokens(requests, **options)


def calls(suite: Any, name: str, tokenizer: "PreTrainedTokenizerBase", seed: int) -> list[Call]:
    """Return all that suite `name` asks of a model with this tokenizer; its data set must exist."""
    recorder = Recorder(tokenizer, seed)
    suite.evaluate(recorder, name, seed)
    return recorder.calls


class Cost(NamedTuple):
    """How much a suite asks: `read` and `written` in tokens, all thinking and answers as long as may be."""

    items: int
    requests: int
    read: int
    written: int


def cost(
    asked: list[Call],
    tokenizer: "PreTrainedTokenizerBase",
    longest: int,
    thinking: "Thinking | None" = None,
) -> Cost:
    """What `asked` amounts to, every prompt counted whole as often as it is asked.

    Args:
        longest: tokens of an answer where its task sets no bound.
        thinking: of the suite. Each draw thinks once, at the largest budget, and answers at every budget.
    """
    items: set[Any] = set()
    read = written = 0
    for number, (method, requests) in enumerate(asked):
        for place, request in enumerate(requests):
            if method == "_loglikelihood_tokens":
                items.add((number, place))
                read += len(request[1]) + len(request[2])
                continue
            items.add(
                (request.task_name.removesuffix("-generation").removesuffix("-likelihood"), request.doc_id)
            )
            texts = request.args[:1] if method == "generate_until" else request.args
            prompt = len(tokenizer("".join(texts), add_special_tokens=False).input_ids)
            answer = request.args[1].get("max_gen_toks", longest) if method == "generate_until" else 0
            read += _read(prompt, thinking, tokenizer) if thinking else prompt
            written += _written(answer, thinking) if thinking else answer
    times = thinking.draws * len(thinking.budgets) if thinking else 1
    return Cost(len(items), times * sum(len(requests) for _, requests in asked), read, written)


def _written(answer: int, thinking: "Thinking") -> int:
    return thinking.draws * (thinking.budgets[-1] + len(thinking.budgets) * answer)


def _read(prompt: int, thinking: "Thinking", tokenizer: "PreTrainedTokenizerBase") -> int:
    """A prompt and what is said around thinking, read to think, after each wait, and for each answer."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    budgets, waits = thinking.budgets, thinking.waits
    start, waited = prompt + count(thinking.begin), waits * count(thinking.wait)
    thoughts = (waits + 1) * start + waits * (budgets[-1] + waited) if budgets[-1] else 0
    ends = start + waited + count(thinking.end) + count(thinking.answer)
    return thinking.draws * (thoughts + len(budgets) * ends + sum(budgets))

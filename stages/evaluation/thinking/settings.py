"""Settings of thinking before an answer; `stages.evaluation.thinking.budget` does it."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from stages.core.schema import Strict


def _ascending(budgets: tuple[int, ...]) -> tuple[int, ...]:
    if list(budgets) != sorted(set(budgets)):
        raise ValueError("allowed: each budget once, the smallest first")
    return budgets


class Thinking(Strict):
    """How long a model thinks, how often, and the words around it."""

    budgets: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_ascending)
    ]
    """Most tokens of thinking; each budget has scores of its own. 0 asks for the answer at once."""
    waits: Annotated[int, Field(ge=0)] = 0
    """How often an end of thinking is replaced by `wait` while the budget lasts."""
    draws: Annotated[int, Field(ge=1)] = 1
    """How often each item is asked."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Temperature of thinking and answer; 0 takes the likeliest token."""
    begin: str = "<think>\n"
    end: Annotated[str, Field(min_length=1)] = "</think>"
    wait: Annotated[str, Field(min_length=1)] = "Wait"
    answer: str = "\n\nFinal Answer:"
    """Text that requests the answer."""
    answer_when: Literal["cut", "always"] = "cut"
    """Where thinking was cut, `answer` is appended whole, as in s1. Where it ended by itself, `cut` appends
    only its whole lines, such as blank ones, and `always` appends it all the same."""

    @model_validator(mode="after")
    def _differing(self) -> "Thinking":
        if self.draws > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.draws} draws at temperature 0 are identical; allowed: 1 draw, or a higher temperature"
            )
        return self

    def request(self, *, ended: bool) -> str:
        """Return the text that requests the answer.

        Args:
            ended: whether thinking ended by itself.
        """
        whole = self.answer_when == "always" or not ended
        return self.answer if whole else self.answer[: self.answer.rfind("\n") + 1]

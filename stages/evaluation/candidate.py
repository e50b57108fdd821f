"""A candidate as a model that lm-eval can ask."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.controls.candidates import Injected
from stages.controls.injected import inject
from stages.model import artifact

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from stages.core.run import Run
    from stages.evaluation.kept import KeptAnswers


def load_candidate(
    record: Mapping[str, Any], run: Run, batch_size: int, kept: KeptAnswers, *, fit: bool = False
) -> LM:
    """Load the candidate whose `artifact.json` is `record`: a model, or a responder without knowledge.

    Args:
        fit: run fewer rows at once than the batch size where a GPU's memory does not hold them.
    """
    candidate = record["artifact"]
    tokenizer = artifact.load_tokenizer(candidate)
    if "responder" in record:
        from stages.evaluation.null import NullLM  # imports lm-eval, as below

        return NullLM.named(record["responder"], tokenizer, run.seed)
    from stages.evaluation.room import memory_of
    from stages.evaluation.shared import SharedPrefixLM

    logging.getLogger("lm_eval.models.huggingface").addFilter(_is_news)
    model = artifact.load_model(candidate, run, dequantize=False)
    if rounding := record.get("rounding"):
        inject(model, Injected(**rounding))
    return SharedPrefixLM(
        kept_answers=kept,
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        memory=memory_of(run.resolved_device()) if fit else None,
        device=str(run.resolved_device()),
        # lm-eval sums log-likelihoods in the model's dtype; bf16 would leave three digits of them.
        softmax_dtype="float32",
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Drop lm-eval's warnings that the model is loaded already, which is intended here."""
    return not record.getMessage().startswith(("`pretrained` model kwarg", "Passed an already-initialized"))

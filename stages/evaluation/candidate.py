"""A candidate as a model that lm-eval can ask."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.controls.candidates import Injected
from stages.controls.injected import inject
from stages.core.backend import MISSING, Backend, installed
from stages.core.errors import Refusal
from stages.model import artifact

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from stages.core.run import Run
    from stages.evaluation.kept import KeptAnswers


def load_candidate(
    record: Mapping[str, Any],
    run: Run,
    batch_size: int,
    kept: KeptAnswers,
    *,
    fit: bool = False,
    backend: Backend = "transformers",
) -> LM:
    """Load the candidate whose `artifact.json` is `record`: a model, or a responder without knowledge.

    Args:
        fit: run fewer rows at once than the batch size where a GPU's memory does not hold them.
        backend: the engine that a model computes in.

    Raises:
        Refusal: vLLM is asked for, and is not installed or does not load the candidate.
    """
    candidate = record["artifact"]
    tokenizer = artifact.load_tokenizer(candidate)
    if "responder" in record:
        from stages.evaluation.null import NullLM  # imports lm-eval, as below

        return NullLM.named(record["responder"], tokenizer, run.seed)
    if backend == "vllm":
        if record.get("rounding"):
            raise Refusal(
                f"{candidate} has rounding noise, which vLLM cannot add; give the suite or the noise "
                "candidate backend: transformers."
            )
        return _in_vllm(candidate, run, batch_size, kept)
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


def _in_vllm(candidate: str, run: Run, batch_size: int, kept: KeptAnswers) -> LM:
    if not installed():
        raise Refusal(f"{MISSING}.")
    # In a process of its own the scheduler takes requests as they arrive, in batches that differ by the run.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from stages.evaluation.vllm import GeneratingLM

    return GeneratingLM(candidate, run, batch_size, kept)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop lm-eval's warnings that the model is loaded already, which is intended here."""
    return not record.getMessage().startswith(("`pretrained` model kwarg", "Passed an already-initialized"))

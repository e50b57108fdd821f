"""vLLM as a model that lm-eval asks to generate, with the prompts, lengths and stops of `SharedPrefixLM`.

lm-eval's own class for vLLM sends the requests and cuts the answers. Here it gets the tokens that
`SharedPrefixLM` reads, the length that transformers gives the model, and a fixed seed; and finished tasks are
kept. Equal inputs give equal answers with the same version of vLLM on the same kind of card: its scheduler
runs in this process (see `stages.evaluation.candidate`), so that requests meet in the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import configure_pad_token, resolve_max_length
from lm_eval.models.vllm_causallms import VLLM

from stages.core.errors import Refusal
from stages.core.files import MODELS
from stages.core.memory import exhausted
from stages.core.reading import reason
from stages.corpus.bos import begin, bos_tokens, closes
from stages.model.artifact import load_config, load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from stages.core.run import Run
    from stages.evaluation.kept import KeptAnswers


class GeneratingLM(VLLM):
    """A candidate in vLLM; it answers `generate_until` alone.

    Args:
        candidate: `<stage>/<recipe>`.
        batch_size: requests that are generated at once.
        kept_answers: keeps the answers to finished tasks.

    Raises:
        Refusal: vLLM does not load the candidate or computes elsewhere than on `run.device`, or the tokenizer
            names no end of text.
    """

    generates_only = True

    def __init__(self, candidate: str, run: Run, batch_size: int, kept_answers: KeptAnswers) -> None:
        _check_device(run)
        config, tokenizer = load_config(candidate), load_tokenizer(candidate)
        if tokenizer.eos_token_id is None:
            raise Refusal(
                f"the tokenizer of {candidate} names no end of text, so answers would have no end; set "
                "eos_token in tokenizer_config.json, or leave backend out."
            )
        try:
            with _own_kernels():
                super().__init__(
                    pretrained=str(MODELS / candidate),
                    dtype=run.dtype,
                    seed=run.seed % 2**32,  # numpy takes 32 bits
                    max_length=resolve_max_length(config, tokenizer, default=HFLM._DEFAULT_MAX_LENGTH),
                    max_num_seqs=batch_size,
                )
        except Exception as error:  # of an engine that does not know a family or a format, of any kind
            if isinstance(error, ImportError) or exhausted(error):
                raise
            raise Refusal(
                f"vLLM does not load {candidate} ({reason(error)}); leave backend out, and transformers "
                "answers the suite."
            ) from error
        self.tokenizer = configure_pad_token(tokenizer, model_config=config)
        self._begin = bos_tokens(tokenizer, "auto") if closes(tokenizer) else None
        self.kept_answers = kept_answers

    apply_chat_template = HFLM.apply_chat_template

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **options: Any) -> Any:
        """Return the tokens of a text, or of each of several, as `SharedPrefixLM.tok_encode` does."""
        if self._begin is None:
            return super().tok_encode(string, add_special_tokens, **options)
        if not isinstance(string, str):
            return [self.tok_encode(each, add_special_tokens, **options) for each in string]
        ids = list(self.tokenizer.encode(string, add_special_tokens=False, **options))
        return ids if add_special_tokens is False else begin(ids, self._begin)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each prompt, up to a stop."""

        def ask() -> list[Any]:
            with _own_kernels():
                return list(super(GeneratingLM, self).generate_until(requests, disable_tqdm=disable_tqdm))

        return self.kept_answers.take("generate_until", [request.args for request in requests], ask)


def _check_device(run: Run) -> None:
    """Refuse a build of vLLM that computes elsewhere than on `run.device`."""
    from vllm.platforms import current_platform

    device = run.resolved_device()
    if (there := current_platform.device_type) != device.type:
        raise Refusal(
            f"run.device is {run.device}, but this vLLM computes on {there}; set run.device: {there}, or "
            "leave backend out."
        )


@contextmanager
def _own_kernels() -> Iterator[None]:
    """Let vLLM use kernels that torch does not list as deterministic; it answers for its own."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)

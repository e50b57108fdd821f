"""The engines that answer a suite: transformers, or vLLM (2309.06180) where every answer is generated.

vLLM keeps many requests going at once and lets each leave when it ends, so it generates several times faster
on a GPU. Its kernels round otherwise than those of transformers, so the engine is recorded beside each score.
Likelihoods stay with transformers: through vLLM they are slow, and depend on the order of requests.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

Backend = Literal["transformers", "vllm"]
_OPTIONS = {
    "until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
}  # fmt: skip
"""The options of generation that mean the same to both engines."""
MISSING = "vllm is not installed here; install the extra prunequant[vllm], or leave backend out"
LIKELIHOOD = "it asks for likelihoods, which vLLM computes slowly and depending on the order of requests"
FORCED = "it forces the length of thinking token by token, which vLLM does not allow"
DRAWN = "its answers are drawn at random, and vLLM would draw others"


def installed() -> bool:
    """Tell whether vLLM is installed; it is not imported."""
    return find_spec("vllm") is not None


def unserved(options: Mapping[str, Any]) -> str | None:
    """Say why vLLM cannot generate under these options of transformers and lm-eval; None if it can."""
    if unknown := sorted(options.keys() - _OPTIONS):
        return f"vLLM has no {', '.join(unknown)}"
    return DRAWN if options.get("do_sample", options.get("temperature", 0) > 0) else None

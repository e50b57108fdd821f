"""Errors that may pass by themselves, so that the same stage can succeed when it runs again.

The network comes back, and so does memory that others held. A wrong setting, a missing file or a bug stays,
and running again would only hide it. The stage's own process decides, as it has the error and all that led to
it; the flow reads the answer in the run record.
"""

import re
from collections.abc import Iterator
from typing import Literal

Passing = Literal["network", "card", "memory"]
"""What ran short: an answer from the network, memory of the card, memory of the machine."""

_NETWORK = {
    "ChunkedEncodingError", "ConnectionError", "NetworkError", "RemoteProtocolError", "Timeout",
    "TimeoutError", "TimeoutException",
}  # fmt: skip
"""Errors of Python, httpx, its successor and requests, by name, so that none is imported to ask."""
_SETTINGS = {"OfflineModeIsEnabled", "SSLCertVerificationError"}
"""Errors of the network that only the user can mend."""
_BUSY = {408, 425, 429, *range(500, 600)}
"""Answers of HTTP that ask to come again, and failures of the server."""
_PIP = re.compile(
    r"^pip cannot download .*(HTTP error (408|425|429|5\d\d)|timed out|Connection (broken|reset|aborted)|"
    r"IncompleteRead|Temporary failure in name resolution|MaxRetryError)"
)
"""pip is a command, so only its words tell."""
_CARD = re.compile(r"CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_MEMORY = re.compile(r"DefaultCPUAllocator|Cannot allocate memory|\(os error 12\)")


def passing(error: BaseException) -> Passing | None:
    """Return what may be over when the stage runs again; None if running again cannot help."""
    errors = list(_causes(error))
    names = [{kind.__name__ for kind in type(each).__mro__} for each in errors]
    if any(own & _SETTINGS for own in names):
        return None
    for each, own in zip(errors, names, strict=True):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status in _BUSY or (own & _NETWORK and status is None) or _PIP.search(str(each)):
            return "network"
        if _CARD.search(str(each)):
            return "card"
        if isinstance(each, MemoryError) or _MEMORY.search(str(each)):
            return "memory"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from, the last first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

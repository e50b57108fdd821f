"""Reading files that somebody else wrote: damage is refused in one sentence.

Checkpoints and data sets come from wherever params say. Damage shows as errors of any type, as parsers do not
look at a file before they parse it. Too little memory and a missing package are not damage.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.core.errors import Refusal, Unreadable
from stages.core.memory import exhausted


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Report any error in the body, which only reads files, as damage to these files.

    Args:
        what: the files' name in the message.

    Raises:
        Unreadable: files are missing, cut off, not permitted, or hold something else.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Refusal | ImportError) or exhausted(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unreadable(
            f"{what} cannot be loaded ({reason[:300].rstrip('.')}); check that its files are all there, "
            "whole and readable, or get them again."
        ) from error

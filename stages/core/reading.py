"""Reading files that somebody else wrote: damage is refused in one sentence.

params may name any checkpoint or data set. A damaged file can raise any type of error, because parsers do not
validate first. Running out of memory or lacking a package is not damage.
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
        raise Unreadable(
            f"{what} cannot be loaded ({reason(error)}); check that its files exist, are complete and are "
            "readable, or download them again."
        ) from error


def reason(error: Exception) -> str:
    """Return the type and the text of an error, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")

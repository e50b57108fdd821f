"""Reading files that somebody else wrote: what is damaged is refused in a sentence.

Checkpoints and data sets come from wherever params say. Damage shows as errors of any type, as those who
parse a file do not look at it first. Too little memory and a missing package are no damage.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.core.errors import Refusal, Unreadable
from stages.core.memory import exhausted


@contextmanager
def reading(what: str) -> Iterator[None]:
    """The body reads files of `what`, and nothing else; whatever stops it is told as theirs.

    Args:
        what: as a refusal names it.

    Raises:
        Unreadable: files are missing, cut off, closed to us, or hold something else.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Refusal | ImportError) or exhausted(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unreadable(
            f"{what} cannot be loaded ({said[:300].rstrip('.')}); see that its files can be read and are all "
            "there and whole, or get it anew."
        ) from error

"""Code: write the identity of the code behind every stage and method, before any other stage runs.

A recipe depends on `data/code/<stage>/<method>` alone for its code (see `stages.core.identity`). This stage
depends on all of `stages/` and runs at every edit of it; where its files stay the same, nothing else runs.
"""

from collections.abc import Iterable

from stages.core import identity
from stages.core.files import CODE, write_text, writing
from stages.job.entry import entry


def code(identified: Iterable[tuple[str, str, str | None]]) -> None:
    """Write `data/code`: for every (stage, method, module of the method) the hashes of the files it runs."""
    with writing(CODE) as folder:
        for stage, method, module in identified:
            write_text(folder / stage / method, identity.text(identity.of(stage, module)))


if __name__ == "__main__":
    entry(code)

"""WikiText's pages, from a data set with a row a line."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_TITLE = re.compile(r" = [^=].*[^=] = \n")


def join_pages(lines: "Dataset") -> "Dataset":
    """Join rows of lines, in column `text`, to rows of pages, in column `page`.

    A page begins with its title, a line such as ` = Cats = ` between blank lines.
    """
    import datasets

    texts = ["", *lines["text"], ""]
    pages: list[list[str]] = [[]]
    for before, line, after in zip(texts, texts[1:], texts[2:], strict=False):
        if _TITLE.fullmatch(line) and not before.strip() and not after.strip():
            pages.append([])
        pages[-1].append(line)
    joined = ["".join(page) for page in pages]
    return datasets.Dataset.from_dict({"page": [page for page in joined if page.strip()]})

"""WikiText's pages, from a data set that has a row a line."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

TITLE = re.compile(r" = [^=].*[^=] = \n")


def joined(lines: "Dataset") -> "Dataset":
    """A data set with a row a page in column `page`, from one with a row a line in column `text`.

    A page begins with its title, a line such as ` = Cats = ` between blank ones.
    """
    import datasets

    texts = ["", *lines["text"], ""]
    pages: list[list[str]] = [[]]
    for before, line, after in zip(texts, texts[1:], texts[2:], strict=False):
        if TITLE.fullmatch(line) and not before.strip() and not after.strip():
            pages.append([])
        pages[-1].append(line)
    found = ["".join(page) for page in pages]
    return datasets.Dataset.from_dict({"page": [page for page in found if page.strip()]})

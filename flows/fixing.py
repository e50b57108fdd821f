"""Fill in what can be known: the hashes of sources that params.yaml lacks."""

from pathlib import Path

from ruamel.yaml import YAML

from flows.layout import relaid
from stages.core.files import write_text
from stages.job.checks.hashes import content_hash, lacking
from stages.job.load import read


def fill_hashes(file: Path) -> list[str]:
    """Write the missing hashes of `path:` and `pypi:` sources into params.yaml; return their places in it.

    Comments stay; entries that do not fit on their line get lines for their fields. A hash that is there
    stays even if the content has another: whether the new content is wanted, only its owner knows.

    Raises:
        Refusal: the file is no YAML, or a source cannot be fetched or is empty. Nothing is written.
    """
    read(file)
    document = YAML().load(file.read_text(encoding="utf-8"))
    filled = []
    for at, entry in lacking(document):
        digest = content_hash(entry)
        entry.pop("sha256", None)
        before = next(key for key in ("file", "folder", "config", "source") if key in entry)
        entry.insert(list(entry).index(before) + 1, "sha256", digest)
        filled.append(f"{at}.sha256")
    if filled:
        write_text(file, relaid(document))
    return filled

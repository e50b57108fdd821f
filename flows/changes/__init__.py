"""What differs between revisions or candidates, and the forms in which it is shown."""

from enum import StrEnum


class Fetched(StrEnum):
    """What `prunequant diff --fetch` brings from the DVC remote into the cache."""

    results = "results"
    all = "all"

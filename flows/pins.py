"""The hub's commits: a branch moves, so params.yaml names the commit that a branch is at."""


def commit_of(kind: str, repository: str, branch: str) -> str:
    """Return the commit at which a branch of a repository on the hub is.

    Args:
        kind: `models` or `datasets`.

    Raises:
        Exception: the network's, or whatever the hub's client makes of it.
    """
    from huggingface_hub import HfApi  # takes a second

    api = HfApi()
    info = (api.model_info if kind == "models" else api.dataset_info)(repository, revision=branch)
    if info.sha is None:
        raise LookupError(f"{repository} has no commit")
    return info.sha

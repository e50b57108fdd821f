"""Upload a folder to a hub as a new repository."""

from pathlib import Path

from stages.core.errors import Refusal


def upload(folder: Path, repository: str, token: str) -> str:
    """Create a model repository and fill it with a folder's files, in one commit.

    Args:
        repository: `org/name`; one that exists is never touched.
        token: with write access.

    Returns:
        The repository's address.

    Raises:
        Refusal: the repository exists, or the hub refuses.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi(token=token)
    try:
        if hub.repo_exists(repository):
            raise Refusal(
                f"{repository} exists on {hub.endpoint} and is not overwritten; choose another name."
            )
        hub.create_repo(repository, private=True, exist_ok=False)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model from prunequant")
    except HFValidationError as error:
        raise Refusal(f"{repository} is no name of a repository: {str(error).splitlines()[0]}") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0].replace(token, "***")
        raise Refusal(f"{repository} could not be uploaded to {hub.endpoint}: {reason}") from None
    return f"{hub.endpoint}/{repository} (private until you publish it)"

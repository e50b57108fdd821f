"""Export an artifact: check it, write it into a folder of its own, and upload that folder if asked."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.commits import git
from flows.exporting import EXPORTING, Destination
from flows.exporting.card import model_card
from flows.scores import edited, summarized
from stages.core.errors import Refusal
from stages.core.files import MODELS, RECORD, SCRATCH
from stages.job.load import load
from stages.job.locked import locked_stages
from stages.job.pieces import dvc_name
from stages.model.artifact import load_record

TOKEN = "HF_TOKEN"
"""The environment variable with the hub's token. It is read from nowhere else."""
_ARTIFACT = re.compile("[a-z]+/[a-z0-9-]+")


_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```
{needs}"""
_NEEDS = "\nIts weights are packed, so it needs the package compressed-tensors.\n"
_LLAMA = """```sh
llama-cli -m {file} -p "Hello"
```"""
_OLLAMA = """```sh
ollama create {name} -f Modelfile
ollama run {name}
```"""


def export(artifact: str, to: Destination, place: str | None, licence: str | None) -> list[str]:
    """Export an artifact; return sentences that say where it is and what changed on the way.

    Args:
        artifact: `<stage>/<recipe>`.
        place: a new folder, for `hub` a repository `org/name`; None is `exports/<recipe>-<to>`.
        licence: for the model card, as hubs name it.

    Raises:
        Refusal: there is no such artifact, something is at the place already, or the target cannot hold the
            artifact as it is.
    """
    if not (_ARTIFACT.fullmatch(artifact) and (MODELS / artifact / RECORD).exists()):
        raise Refusal(
            f"there is no artifact {artifact} in {MODELS}; `prunequant run` makes it, `dvc pull` fetches it."
        )
    record = load_record(artifact)
    if record["base"].get("format") == "packed":
        raise Refusal(
            f"{artifact} is a published checkpoint, which this project did not make; share its source, "
            f"{record['base']['source']}, or export a recipe."
        )
    scores = _scores(artifact)
    name = artifact.partition("/")[2]
    if to is Destination.hub:
        from flows.exporting.upload import upload

        if place is None or place.count("/") != 1:
            raise Refusal(f"--to hub needs a repository: --output org/name, not {place}.")
        if not os.environ.get(TOKEN):
            raise Refusal(
                f"--to hub needs a token with write access in the environment: export {TOKEN}=hf_..."
            )
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=EXPORTING, dir=SCRATCH) as scratch:
            folder = Path(scratch)
            _copy(artifact, folder)
            _card(folder, record, scores, _by_transformers(record, place), licence)
            address = upload(folder, place, os.environ[TOKEN])
        return [f"{artifact} is at {address}."]
    target = Path(place) if place else Path("exports") / f"{name}-{to}"
    with _folder(target) as folder:
        if to is Destination.hf:
            _copy(artifact, folder)
            _card(folder, record, scores, _by_transformers(record, f"./{target.name}"), licence)
            return [f"{artifact} is in {target}, for transformers and serving engines that read its layout."]
        from flows.exporting.ggml_file import write_gguf

        file = folder / f"{name}.gguf"
        written = write_gguf(artifact, MODELS / artifact, file)
        size = f"{written.size / 1e6:,.1f} MB"
        loading = f"{file.name} has {size}.\n\n{_LLAMA.format(file=file.name)}"
        if to is Destination.ollama:
            (folder / "Modelfile").write_text(f"FROM ./{file.name}\n", encoding="utf-8")
            loading = _OLLAMA.format(name=name)
        _card(folder, record, scores, loading, licence, written.size)
    kinds = ", ".join(f"{count} as {kind}" for kind, count in written.matrices.items())
    sentences = [
        f"{artifact} is in {target / file.name}, {size}: of its matrices {kinds}"
        + (", with their codes unchanged." if any(kind.startswith("Q") for kind in written.matrices) else ".")
    ]
    if any(step.get("bits") in (2, 3) for step in record["recipes"].values()):
        sentences.append(
            "GGUF has no grid of 2 or 3 bits like these, so such codes take 4 bits there; the artifact has "
            f"{record['bytes_on_disk'] / 1e6:,.1f} MB."
        )
    if written.rounding:
        sentences.append(
            "Zero points became minimums in fp16, which moves weights by at most "
            f"{written.rounding:.1e} of a step."
        )
    return sentences


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` once all is written; nothing of it stays otherwise."""
    if target.exists():
        raise Refusal(f"{target} exists; name another folder with --output, or remove it.")
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise Refusal(
            f"{target} cannot be written ({error.strerror}); name another folder with --output."
        ) from None
    try:
        yield unfinished
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _copy(artifact: str, folder: Path) -> None:
    """Copy a checkpoint, without links into the project's cache."""
    for file in sorted((MODELS / artifact).iterdir()):
        shutil.copyfile(file, folder / file.name)


def _by_transformers(record: dict[str, Any], place: str) -> str:
    needs = _NEEDS if str(record["layout"]) != "dense" else ""
    return _TRANSFORMERS.format(place=place, needs=needs)


def _card(
    folder: Path,
    record: dict[str, Any],
    scores: list[dict[str, Any]],
    loading: str,
    licence: str | None,
    gguf: int | None = None,
) -> None:
    card = model_card(record, scores, loading, licence, _commit(), gguf)
    (folder / "README.md").write_text(card, encoding="utf-8")  # where hubs look for it


def _scores(artifact: str) -> list[dict[str, Any]]:
    """Return the artifact's rows of the last report; none if it has since been made again or edited."""
    rows = [row for row in summarized() if row["candidate"] == artifact]
    if not rows:
        return []
    params = load(device=False)
    if edited(params, artifact):
        return []
    path, entries = str(MODELS / artifact), locked_stages()
    now = {out["md5"] for entry in entries.values() for out in entry.get("outs", ()) if out["path"] == path}
    evaluations = [dvc_name("evaluate", params, f"{artifact}/{suite}") for suite in params.suites.by_name()]
    scored = {
        dep["md5"]
        for name in evaluations
        for dep in entries.get(name, {}).get("deps", ())
        if dep["path"] == path
    }
    return rows if scored <= now else []


def _commit() -> str | None:
    """Return the commit that is checked out, None outside git or if it has other params or another lock."""
    try:
        return None if git("status", "--porcelain", "params.yaml", "dvc.lock") else git("rev-parse", "HEAD")
    except Refusal:
        return None

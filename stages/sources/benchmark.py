"""A published benchmark's data in the hub's layout, `<config>/<split>.parquet`, for lm-eval's stock tasks.

The source is a pinned revision on the hub or a local mirror of it. Both give the same files, and evaluation
reads only these, so it needs no hub. A benchmark of many tasks, such as MMLU, has a config per task, each
written to a folder of its own.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from stages.core.errors import Refusal
from stages.core.files import contents
from stages.core.lazy import pd
from stages.core.reading import reading
from stages.core.schema import Sha256, Strict
from stages.sources.dataset import Dataset
from stages.sources.origin import InnerPath, Origin, fetched


class NltkData(Strict):
    """A zip of nltk's tokenizer data inside a source; IFEval's checker needs `punkt_tab`."""

    source: Origin
    file: InnerPath
    sha256: Sha256


def _apart(configs: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse configs that are the same folder or contain each other, as each is written to its own folder."""
    for number, config in enumerate(configs):
        path = PurePosixPath(config)
        if not path.parts:
            raise ValueError(f"{config!r} is the whole source; write it alone, not in a list")
        for other in map(PurePosixPath, configs[:number]):
            if path.is_relative_to(other) or other.is_relative_to(path):
                raise ValueError(f"the folders {other} and {path} overlap; remove one")
    return configs


class Benchmark(Dataset):
    """One or several configs of a data set's repository."""

    kind: Literal["benchmark"]
    source: Origin
    config: Annotated[
        Annotated[InnerPath, Tag("single")]
        | Annotated[tuple[InnerPath, ...], Field(min_length=1), AfterValidator(_apart), Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list | tuple) else "single"),
    ]
    """Folder of the config's parquet files, such as `main` or `ARC-Easy`, or a list of such folders."""
    sha256: Sha256 | None = None
    """Hash of that folder, or of the whole source for a list. Needed for a mirror; a commit pins the hub's
    content."""
    nltk_data: NltkData | None = None

    @property
    def pinned(self) -> str:
        """The path inside the source that `sha256` hashes."""
        return self.config if isinstance(self.config, str) else ""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `<split>.parquet` for every split, or `<config>/<split>.parquet` for a list of configs.

        Unpack `nltk_data` into a folder of that name.
        """
        if isinstance(self.config, str):
            with fetched(self.source, self.config, self.sha256, data=True) as path:
                splits = self._write(path, folder)
        else:
            splits = []
            if self.sha256 is not None:
                with fetched(self.source, "", self.sha256, data=True):
                    pass
            for config in self.config:
                (folder / config).mkdir(parents=True)
                with fetched(self.source, config, None, data=True) as path:
                    splits += [f"{config}/{split}" for split in self._write(path, folder / config)]
        if self.nltk_data is not None:
            data = self.nltk_data
            with (
                fetched(data.source, data.file, data.sha256) as archive,
                reading(f"nltk_data, {data.source} {data.file},"),
                zipfile.ZipFile(archive) as opened,
            ):
                opened.extractall(folder / "nltk_data" / "tokenizers")
        return {"splits": splits}

    def _write(self, path: Path, folder: Path) -> list[str]:
        """Write each split of the config at `path` as one file into `folder`; return the splits' names."""
        if path.is_file():
            raise Refusal(
                f"{self.source}: {path.name} is a file; name the folder of its parquet files, in config "
                "or in source."
            )
        files = [file for file in contents(path) if file.suffix == ".parquet"]
        if not files:
            raise Refusal(
                f"{self.source} has no parquet files in {path.name}; set config to a folder that has."
            )
        splits: dict[str, list[Path]] = {}
        # The hub shards a long split as <split>-00000-of-00003.parquet; its branch refs/convert/parquet has
        # <split>/0000.parquet.
        for file in files:
            split = file.stem if file.parent == path else file.parent.name
            splits.setdefault(re.sub(r"-\d{5}-of-\d{5}$", "", split), []).append(file)
        for split, shards in splits.items():
            if len(shards) == 1:
                shutil.copyfile(shards[0], folder / f"{split}.parquet")
            else:
                pd.concat([pd.read_parquet(shard) for shard in shards]).to_parquet(
                    folder / f"{split}.parquet"
                )
        return sorted(splits)

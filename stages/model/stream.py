"""A model larger than memory: its blocks are read when they are worked on and written when they are done.

A block's parameters take no memory until its turn comes (`Streamed.block`): they are read from the source
(`stages.model.source`), changed, written to a shard of the new checkpoint in `data/scratch/`, and given up
again. What is held is one block, the embeddings where text passes through, and the calibration's
activations.

A killed run leaves its finished shards behind, in a folder named after everything they were computed
from, and the next run takes them as they are. (A refused one leaves nothing, but where it could not read.)
When all are there they become the artifact: one file below `ONE_FILE` bytes, a shard a block beyond.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.core.errors import Refusal, Unreadable
from stages.core.files import MODELS, RECORD, SCRATCH, sha256, write_json, writing
from stages.core.lazy import torch
from stages.core.numbers import check_finite
from stages.model.blocks import linears
from stages.model.checkpoint import Sizes, check_codes, check_zeros, lineage, zero_masks
from stages.model.grid import Quantized
from stages.model.packed import described, loads_packed, packable, tensors_of, weight_from
from stages.model.resume import place
from stages.model.source import Empty, put

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.core.run import Run
    from stages.core.schema import Recipe

ONE_FILE = 2**30
"""Bytes below which a checkpoint is one file."""
RESUME = SCRATCH / "resume"

log = logging.getLogger(__name__)


class Streamed(Empty):
    """A model on its way from `recipe.source` to `artifact`: each block is written when it is left.

    `quantized` takes the codes of linears, by full name, before their block is left; they are written
    packed where a format holds them. `noted` takes lists of facts about the block in hand; the record has
    them joined over blocks. Positions that are zero in the source must be zero when written.
    """

    def __init__(self, artifact: str, recipe: Recipe, run: Run) -> None:
        super().__init__(recipe.source, run)
        self.artifact, self.recipe, self.run = artifact, recipe, run
        self.quantized: dict[str, Quantized] = {}
        self.noted: dict[str, list[str]] = {}
        self.scheme: dict[str, Any] | None = None
        self.fake = False
        self._names = [name for name, _ in self._blocks]
        self._linears = linears(self.model, recipe.ignore)
        self._weights = {f"{one.name}.weight" for one in linears(self.model, partial=True)}
        self._loads_packed = loads_packed(self.model, [one.name for one in self._linears])
        self._check_rest()
        _ = self.tokenizer  # refused now rather than when all is done
        stage = artifact.split("/")[0]
        self._folder = place(RESUME / artifact.replace("/", "__"), stage, recipe, run)
        self._forget_broken()
        if finished := sum(self._done(name) for name in self._names):
            log.info("%s goes on: %d of %d blocks were finished before", artifact, finished, len(self._names))

    def _shard(self, name: str) -> Path:
        return self._folder / f"{self._names.index(name):05d}.safetensors"

    def _done(self, name: str) -> bool:
        return self._shard(name).with_suffix(".json").exists()

    def _forget_broken(self) -> None:
        """Do blocks again whose files are not as they were written: a machine went down.

        Raises:
            Unreadable: they cannot be read at all, which may pass.
        """
        for file in (self._shard(name) for name in self._names if self._done(name)):
            told = file.with_suffix(".json")
            try:
                facts = json.loads(told.read_text())
                whole = facts.pop("seal") == _seal(file, facts)
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                whole = False
            except OSError as error:
                raise Unreadable(
                    f"finished blocks in {self._folder} cannot be read ({error}); see that they can, or "
                    "delete the folder to begin anew."
                ) from error
            if not whole:
                log.warning("%s or its JSON is not as it was written: its block is done again", file)
                told.unlink()

    @contextmanager
    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        """Hold the block's weights, as the source or a finished shard has them; write and drop them after.

        Where the source is refused, finished shards are of no use: no run of these settings goes on. Where it
        cannot be read, one will.
        """
        try:
            with self._held(name, block, dense) as done:
                yield done
        except Unreadable:
            raise
        except Refusal:
            shutil.rmtree(self._folder.parent, ignore_errors=True)
            raise

    @contextmanager
    def _held(self, name: str, block: nn.Module, dense: bool) -> Iterator[bool]:
        if self._done(name):
            told = json.loads(self._shard(name).with_suffix(".json").read_text())
            self.scheme, self.fake = told["scheme"], told["fake"]
        if self._done(name) and dense:
            self._fill(name, block)
            yield True
        elif self._done(name):
            stored = load_file(self._shard(name))
            for local in [local for local, _ in block.named_parameters()]:
                full = f"{name}.{local}"
                put(block, local, weight_from(stored, full, self.scheme).to(self._device, self._dtype))
            yield True
        else:
            self._fill(name, block)
            zeros = zero_masks([one for one in self._linears if one.block == name])
            yield False
            self._write(name, block, zeros)
        self._drop(block)

    def _write(self, name: str, block: nn.Module, zeros: Mapping[str, Tensor]) -> None:
        codes = {full: self.quantized.pop(full) for full in list(self.quantized)}
        self.fake = bool(codes) and not (
            self._loads_packed
            and all(packable(self.model.get_submodule(full), code) for full, code in codes.items())
        )
        if codes and not self.fake:
            self.scheme = next(iter(codes.values())).scheme()
        sizes, stored = Sizes(), dict[str, torch.Tensor]()
        for local, parameter in block.named_parameters():
            full = f"{name}.{local}"
            linear = full.removesuffix(".weight")
            sizes.add(parameter, codes.get(linear), prunable=full in self._weights)
            if linear in codes and not self.fake:
                stored |= tensors_of(linear, codes[linear])
            else:
                stored[full] = parameter.detach().cpu().contiguous()
        stored |= {
            f"{name}.{local}": buffer.cpu() for local, buffer in block.state_dict().items()
            if f"{name}.{local}" not in stored and local in dict(block.named_buffers())
        }  # fmt: skip
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._shard(name).with_suffix(".partial")
        save_file(stored, partial, metadata={"format": "pt"})
        reread = load_file(partial)
        check_zeros(zeros, lambda full: weight_from(reread, f"{full}.weight", self.scheme))
        if not self.fake:
            check_codes(codes, lambda linear: weight_from(reread, f"{linear}.weight", self.scheme))
        partial.replace(self._shard(name))
        facts = {
            "sizes": sizes.counts, "scheme": self.scheme, "fake": self.fake, "quantized": sorted(codes),
            "noted": self.noted,
        }  # fmt: skip
        self.noted = {}
        sealed = facts | {"seal": _seal(self._shard(name), facts)}
        write_json(self._shard(name).with_suffix(".json"), sealed)

    def finish(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """Put the shards together into the artifact and return its record."""
        facts = [json.loads(self._shard(name).with_suffix(".json").read_text()) for name in self._names]
        sizes = Sizes()
        for fact in facts:
            sizes.merge(fact["sizes"])
        packed = [fact["scheme"] for fact in facts if fact["quantized"] and not fact["fake"]]
        if any(scheme != packed[0] for scheme in packed):
            raise ValueError("blocks on unlike grids make no one checkpoint")
        self.fake = any(fact["fake"] for fact in facts)
        self.scheme = packed[0] if packed else None
        quantized = {name for fact in facts for name in fact["quantized"]}
        if quantized and quantized != {one.name for one in self._linears}:
            raise AssertionError(f"{len(quantized)} of {len(self._linears)} linears were quantized")
        joined: dict[str, list[str]] = {}
        for key, found in [noted for fact in facts for noted in fact["noted"].items()]:
            joined.setdefault(key, []).extend(found)
        rest = self._rest(sizes)
        self._drop(self.model)  # the embeddings, which are read once more, one tensor at a time
        self.model.tie_weights()
        with writing(MODELS / self.artifact) as folder:
            self._assemble(folder, rest)
            self.model.config.__dict__.pop("quantization_config", None)
            config = described(self.model, quantized if not self.fake else set(), self.scheme)
            config.save_pretrained(folder)
            if self.model.can_generate() and self.model.generation_config is not None:
                _generation_config(MODELS / self.recipe.source, folder)
            self.tokenizer.save_pretrained(folder)
            layout = "fake_quantized" if self.fake else self.scheme["format"] if self.scheme else "dense"
            record = {
                **lineage(self.artifact, self.recipe, self.run, {**notes, **joined}),
                "layout": layout,
                **sizes.told(),
                "bytes_on_disk": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            }
            (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        shutil.rmtree(self._folder.parent)
        return record

    def _rest(self, sizes: Sizes) -> dict[str, int]:
        """What lies outside blocks, as bytes by name, counted into `sizes`. Tied tensors come once."""
        inside = tuple(f"{name}." for name in self._names)
        found = {}
        for name, parameter in self.model.named_parameters():
            if not name.startswith(inside):
                sizes.add(parameter, None, prunable=False)
                found[name] = parameter.numel() * parameter.element_size()
        for name, buffer in self.model.named_buffers():
            if name in self._source and not name.startswith(inside):
                found[name] = buffer.numel() * buffer.element_size()
        return found

    def _dense(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """A shard's tensors, as they are or with packed ones dequantized where the artifact is not packed."""
        if not self.fake:
            return stored
        names = {f"{one.name}.weight" for one in self._linears if f"{one.name}.weight_scale" in stored}
        parts = tuple(f"{name}_" for name in names)
        rest = {key: tensor for key, tensor in stored.items() if not key.startswith(parts)}
        return rest | {name: weight_from(stored, name, self.scheme).to(self._dtype) for name in sorted(names)}

    def _read(self, name: str) -> Tensor:
        """What lies outside blocks under this name, in the dtype it is written in."""
        return self._source.read(name).to("cpu", self.model.state_dict()[name].dtype)

    def _check_rest(self) -> None:
        """Read what lies outside blocks once, a tensor at a time, before any work is done on them.

        Raises:
            Refusal: some of it is no number.
        """
        check_finite(self.name, ((name, self._read(name)) for name in self._rest(Sizes())))

    def _assemble(self, folder: Path, rest: Mapping[str, int]) -> None:
        """Write the safetensors: one file where that is small, a shard a block and an index beyond.

        Tensors are named as the family's checkpoints name them, which is not always as its modules do. Where
        not all blocks could be packed, none is.
        """
        from transformers.core_model_loading import revert_weight_conversion

        files = [self._shard(name) for name in self._names]
        size = sum(file.stat().st_size for file in files) + sum(rest.values())
        if self.fake:
            size = sum(one.numel() * one.element_size() for one in self.model.parameters())

        def named(part: Path | str) -> dict[str, Tensor]:
            held = self._dense(load_file(part)) if isinstance(part, Path) else {part: self._read(part)}
            out = revert_weight_conversion(self.model, held)
            return {name: tensor.contiguous() for name, tensor in out.items()}

        parts: list[Path | str] = [*files, *rest]
        if size < ONE_FILE:
            whole = {name: tensor for part in parts for name, tensor in named(part).items()}
            save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
            return
        index: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            target = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensors = named(part)
            index |= dict.fromkeys(tensors, target.name)
            if isinstance(part, Path) and tensors.keys() == _names(part):
                _link(part, target)  # the scratch copy stays until the artifact is whole
            else:
                save_file(tensors, target, metadata={"format": "pt"})
        told = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(told, indent=2) + "\n")


def _seal(shard: Path, facts: Mapping[str, Any]) -> str:
    """A hash of a finished block: its shard, and what is told of it as JSON reads it back."""
    return hashlib.sha256(f"{json.dumps(facts, sort_keys=True)} {sha256(shard)}".encode()).hexdigest()


def _link(file: Path, target: Path) -> None:
    """The same bytes under another name: a link, or a copy where the file system has none."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as handle:
        return set(handle.keys())


def _generation_config(source: Path, folder: Path) -> None:
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", folder)

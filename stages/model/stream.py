"""A model larger than memory, compressed block by block.

A block's parameters take no memory until its turn comes (`Streamed.block`): they are read from the source
(`stages.model.source`), changed, written to a shard in `data/scratch/`, and dropped. The device holds one
block, the embeddings where text passes through, and the calibration's activations.

Reading and writing go on beside the arithmetic. Threads read the next block while this one is compressed.
The finished one is copied off the device; a thread writes it, checks the file, and only then marks the block
as finished. Next to a card two threads do so, since a block of a fast method takes less time to compress than
to write and check. So the CPU's memory holds three blocks at most: one ahead, the current one and one behind,
or one ahead and two behind if the current one is on a card.

A killed run leaves its finished shards in a folder named after everything they were computed from, and the
next run starts from them. A refused run deletes them, unless files could not be read. Once all blocks are
finished they become the artifact: a single file below `stages.model.assembly.ONE_FILE` bytes, else a file per
block.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.core.errors import Refusal, Unreadable
from stages.core.files import MODELS, SCRATCH, checksum, checksum_of, replacing, writing
from stages.core.lazy import torch
from stages.core.numbers import check_finite
from stages.model.artifact import Unloadable, bytes_on_disk, check_loads, write_record
from stages.model.assembly import CheckpointPart, copy_generation_config, write_tensors
from stages.model.blocks import linears
from stages.model.checkpoint import Sizes, check_zeros, lineage, zero_masks
from stages.model.grid import Quantized
from stages.model.packed import code_from, config_of, loads_packed, packable, tensors_of, weight_from
from stages.model.resume import place
from stages.model.shards import BlockFacts, Shards
from stages.model.source import Empty, Read

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.core.run import Run
    from stages.core.schema import Recipe

RESUME = SCRATCH / "resume"

WRITERS = {"cpu": 1, "cuda": 2}
"""Blocks that are written at a time, by the type of device. On a CPU they share its cores and memory."""

log = logging.getLogger(__name__)


class Streamed(Empty):
    """A model on its way from `recipe.source` to `artifact`; each block is written at the end of its `block`.

    Positions that are zero in the source must be zero when written.
    """

    def __init__(self, artifact: str, recipe: Recipe, run: Run) -> None:
        super().__init__(recipe.source, run)
        self.artifact, self.recipe, self.run = artifact, recipe, run
        self.quantized: dict[str, Quantized] = {}
        """Codes of the current block's linears, by full name; written packed where a format holds them."""
        self.noted: dict[str, list[str]] = {}
        """Notes on the current block; the record joins the lists of all blocks."""
        self._names = [name for name, _ in self._blocks]
        self._linears = linears(self.model, recipe.ignore)
        self._prunable = {f"{linear.name}.weight" for linear in linears(self.model, partial=True)}
        self._loads_packed = loads_packed(self.model, [linear.name for linear in self._linears])
        self._most_behind = WRITERS.get(self._device.type, 1)
        self._writers = ThreadPoolExecutor(self._most_behind, "writer")
        self._behind: deque[Future[None]] = deque()
        """The writes of the blocks before, the oldest first."""
        self._check_rest()
        _ = self.tokenizer  # refused now rather than at the end
        stage = artifact.split("/")[0]
        folder = place(RESUME / artifact.replace("/", "__"), stage, recipe, run)
        self._shards = Shards(folder, self._names)
        self._shards.forget_damaged()
        if finished := sum(map(self._shards.done, self._names)):
            log.info("%s resumes: %d of %d blocks are finished", artifact, finished, len(self._names))

    @contextmanager
    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        """Hold the block's weights, from the source or a finished shard; then write and drop them.

        A refusal deletes all shards, since every run with these settings would be refused. If files could not
        be read, a later run may succeed, and the shards stay.
        """
        try:
            with self._weights(name, block, dense) as done:
                yield done
        except BaseException as error:
            wait(self._behind)
            if isinstance(error, Refusal) and not isinstance(error, Unreadable):
                self._shards.delete()
            raise

    @contextmanager
    def _weights(self, name: str, block: nn.Module, dense: bool) -> Iterator[bool]:
        if name == self._names[0]:  # a walk begins, which the write of an earlier walk's last block precedes
            self._settle()
        done = self._shards.done(name)
        self._bring(name, block, dense=dense)
        zeros = {} if done else zero_masks(linear for linear in self._linears if linear.block == name)
        yield done
        if not done:
            self._write(name, block, zeros)
        self._drop(block)

    def _reader(self, name: str, dense: bool) -> Read:
        """Return how a block's tensors are read: from its shard if it is finished, unless `dense`."""
        if dense or not self._shards.done(name):
            return super()._reader(name, dense)
        stored, scheme = load_file(self._shards.file(name)), self._shards.facts(name).scheme
        return lambda full: weight_from(stored, full, scheme)

    def _write(self, name: str, block: nn.Module, zeros: Mapping[str, Tensor]) -> None:
        """Check the block's weights, copy them off the device, and begin to write the shard.

        Raises:
            AssertionError: a zero of the source was lost; a bug, never a user's mistake.
        """
        codes, self.quantized = self.quantized, {}
        noted, self.noted = self.noted, {}
        packed = self._loads_packed and all(
            packable(self.model.get_submodule(linear), code) for linear, code in codes.items()
        )
        scheme = next(iter(codes.values())).scheme() if codes and packed else None
        check_zeros(zeros, lambda linear: self._computed(linear, codes if packed else {}))
        sizes = Sizes()
        dense: dict[str, Tensor] = {}
        for local, parameter in block.named_parameters():
            full = f"{name}.{local}"
            linear = full.removesuffix(".weight")
            sizes.add(parameter, codes.get(linear), prunable=full in self._prunable)
            if linear not in codes or not packed:
                dense[full] = parameter.detach()
        dense |= {
            f"{name}.{local}": buffer for local, buffer in block.state_dict().items()
            if local in dict(block.named_buffers())
        }  # fmt: skip
        facts = BlockFacts(sizes.counts, scheme, bool(codes) and not packed, sorted(codes), noted)
        self._settle(self._most_behind - 1)
        dense, codes = off_device(dense, codes if packed else {})
        self._behind.append(self._writers.submit(self._save, name, dense, codes, facts))

    def _computed(self, linear: str, codes: Mapping[str, Quantized]) -> Tensor:
        """Return the weight of a linear, by its full name, that is written as codes or as it is."""
        if linear in codes:
            return codes[linear].dequantize()
        return self.model.get_parameter(f"{linear}.weight").data

    def _save(
        self, name: str, dense: Mapping[str, Tensor], codes: Mapping[str, Quantized], facts: BlockFacts
    ) -> None:
        """Write a block's shard, check that it holds what was computed, and mark the block as finished.

        Raises:
            AssertionError: codes or bytes were changed in writing; a bug, never a user's mistake.
        """
        stored = dict(dense)
        for linear, code in codes.items():
            assert facts.scheme is not None
            tensors = tensors_of(linear, code)
            if not code.equals(code_from(tensors, f"{linear}.weight", facts.scheme)):
                raise AssertionError(f"{linear}: the codes to be written differ from those computed")
            stored |= tensors
        with replacing(self._shards.file(name)) as partial:
            save_file(stored, partial, metadata={"format": "pt"})
            written = check_written(partial, stored)
        self._shards.finish(name, facts, written)

    def _settle(self, most: int = 0) -> None:
        """Wait until at most so many blocks are being written; raise what went wrong with the others."""
        while len(self._behind) > most:
            self._behind.popleft().result()

    def finish(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """Put the shards together into the artifact and return its record."""
        self._settle()
        blocks = [self._shards.facts(name) for name in self._names]
        sizes = Sizes()
        noted: dict[str, list[str]] = {}
        for facts in blocks:
            sizes.add_block(facts.sizes)
            for key, names in facts.noted.items():
                noted.setdefault(key, []).extend(names)
        schemes = [facts.scheme for facts in blocks if facts.scheme]
        if any(scheme != schemes[0] for scheme in schemes):
            raise ValueError("blocks on different grids cannot form a checkpoint")
        fake = any(facts.fake for facts in blocks)
        scheme = schemes[0] if schemes else None
        quantized = {name for facts in blocks for name in facts.quantized}
        if quantized and quantized != {linear.name for linear in self._linears}:
            raise AssertionError(f"{len(quantized)} of {len(self._linears)} linears were quantized")
        rest = self._rest(sizes)
        self._drop(self.model)  # the embeddings, which are read again one at a time
        self.model.tie_weights()
        with writing(MODELS / self.artifact) as folder:
            self.model.config.__dict__.pop("quantization_config", None)
            fake = self._write_loadable(folder, rest, quantized, scheme, fake=fake)
            if self.model.can_generate() and self.model.generation_config is not None:
                copy_generation_config(MODELS / self.recipe.source, folder)
            self.tokenizer.save_pretrained(folder)
            record = {
                **lineage(self.artifact, self.recipe, self.run, {**notes, **noted}),
                "layout": "fake_quantized" if fake else scheme["format"] if scheme else "dense",
                **sizes.summary(),
                "bytes_on_disk": bytes_on_disk(folder),
            }
            write_record(folder, record)
        self._shards.delete()
        return record

    def _write_loadable(
        self,
        folder: Path,
        rest: Mapping[str, int],
        quantized: set[str],
        scheme: Mapping[str, Any] | None,
        *,
        fake: bool,
    ) -> bool:
        """Write config and safetensors, packed if plain transformers loads that; return whether dense.

        Args:
            rest: bytes of the tensors outside blocks, by name.
            quantized: full names of the linears on a grid.
            fake: write these linears dense, because not every block could be packed.

        Raises:
            Refusal: plain transformers does not load the checkpoint.
        """
        self._assemble(folder, rest, scheme, dequantize=fake)
        config_of(self.model, set() if fake else quantized, scheme).save_pretrained(folder)
        try:
            check_loads(self.artifact, folder)
        except Unloadable as refusal:
            # Dense linears would not have their inputs rounded.
            if fake or scheme is None or scheme.get("input_activations"):
                raise
            log.warning("%s is written dense, as it does not load packed: %s", self.artifact, refusal)
            for file in folder.iterdir():
                file.unlink()
            return self._write_loadable(folder, rest, quantized, scheme, fake=True)
        return fake

    def _assemble(
        self, folder: Path, rest: Mapping[str, int], scheme: Mapping[str, Any] | None, *, dequantize: bool
    ) -> None:
        """Write the safetensors from the shards and the tensors outside blocks.

        Args:
            rest: bytes of the tensors outside blocks, by name.
            dequantize: write dense weights, because not every block could be packed.
        """

        def load(part: CheckpointPart) -> dict[str, Tensor]:
            if isinstance(part, str):
                return {part: self._read(part)}
            stored = load_file(part)
            return self._dequantized(stored, scheme) if dequantize else stored

        shards = [self._shards.file(name) for name in self._names]
        if dequantize:
            size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        else:
            size = sum(file.stat().st_size for file in shards) + sum(rest.values())
        packed = scheme is not None and not dequantize
        write_tensors(folder, self.model, [*shards, *rest], load, size, packed=packed)

    def _dequantized(self, stored: dict[str, Tensor], scheme: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """Return a shard's tensors with packed weights dequantized."""
        weights = [f"{linear.name}.weight" for linear in self._linears]
        packed = sorted(name for name in weights if f"{name}_scale" in stored)
        parts = tuple(f"{name}_" for name in packed)
        dense = {name: tensor for name, tensor in stored.items() if not name.startswith(parts)}
        return dense | {name: weight_from(stored, name, scheme).to(self._dtype) for name in packed}

    def _rest(self, sizes: Sizes) -> dict[str, int]:
        """Return the bytes of each tensor outside blocks, tied ones once, and count them in `sizes`."""
        inside = tuple(f"{name}." for name in self._names)
        rest = {}
        for name, parameter in self.model.named_parameters():
            if not name.startswith(inside):
                sizes.add(parameter, None, prunable=False)
                rest[name] = parameter.numel() * parameter.element_size()
        for name, buffer in self.model.named_buffers():
            if name in self._source and not name.startswith(inside):
                rest[name] = buffer.numel() * buffer.element_size()
        return rest

    def _read(self, name: str) -> Tensor:
        """Read a tensor outside blocks in the dtype it is written in."""
        return self._source.read(name).to("cpu", self.model.state_dict()[name].dtype)

    def _check_rest(self) -> None:
        """Check the tensors outside blocks, one at a time, before any work is done.

        Raises:
            Refusal: some values are NaN or infinite.
        """
        check_finite(self.name, ((name, self._read(name)) for name in self._rest(Sizes())))


def off_device(
    dense: Mapping[str, Tensor], codes: Mapping[str, Quantized]
) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    """Copy tensors and codes to the CPU, waiting for the device once; what is there already is not copied."""
    devices: set[torch.device] = set()

    def copied(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu().contiguous()
        devices.add(tensor.device)
        page_locked = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return page_locked.copy_(tensor, non_blocking=True)

    def code_copied(code: Any) -> Quantized:
        values = {name: value for name, value in vars(code).items() if isinstance(value, torch.Tensor)}
        copy: Quantized = replace(code, **{name: copied(value) for name, value in values.items()})
        return copy

    result = {n: copied(t) for n, t in dense.items()}, {n: code_copied(c) for n, c in codes.items()}
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return result


def check_written(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Check that a safetensors file holds exactly these tensors, on the CPU, and return its checksum.

    Raises:
        AssertionError: it does not; a bug or a fault of the disk, never a user's mistake.
    """
    with safe_open(file, "pt") as handle:
        stored = {name: handle.get_tensor(name) for name in handle.offset_keys()}  # mapped, not read

    def kinds(of: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in of.items()}

    if kinds(stored) == kinds(tensors):
        # A tensor of a single entry counts as contiguous whatever its strides.
        flat = [tensors[name].as_strided((tensors[name].numel(),), (1,)) for name in stored]
        parts = [tensor.view(torch.uint8).numpy().data for tensor in flat]
        with file.open("rb") as opened:
            header = opened.read(file.stat().st_size - sum(map(len, parts)))
        if (written := checksum(file)) == checksum_of([memoryview(header), *parts]):
            return written
    raise AssertionError(f"{file} differs from the tensors that were written to it")

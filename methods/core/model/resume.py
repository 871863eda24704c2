"""What a method that goes block by block has done so far, kept in files while it goes: one that is killed loses a minute or a
block, whichever is longer, and ends with the same numbers as if it had not been. Of a large model, blocks that are done are
in these files only.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.core.formats import Packed, make
from methods.core.job import ranks
from methods.core.job.log import RunLog
from methods.core.job.runtime import dtype_name
from methods.core.job.saves import Saves
from methods.core.job.tensors import read_sealed, read_state, write_sealed
from methods.core.model.anatomy import block_linears, decoder_blocks, replace_module
from methods.core.model.layers import QuantizedLinear, are_large, quantized_layers

STREAMS, LAYERS = "streams.safetensors", "layers-*.safetensors"


class Resume:
    """The state of a way through the blocks, in `blocks/` of the log's folder.

    done: how many blocks are finished; the model's layers in them are quantized again. streams: by name, what entered the
    next block, by batch. extra: tensors that the method wants back, saved as they are by then.

    Nothing is kept without a folder, of blocks that stay unquantized, or where several processes share the tokens: then all
    blocks stay in memory.
    """

    def __init__(self, model: nn.Module, log: RunLog):
        self.model, self.log = model, log
        self.prefix, self.blocks = decoder_blocks(model)
        self.folder = log.folder / "blocks" if log.folder and ranks.count() == 1 else None
        self.done = 0
        self.streams: dict[str, list[Tensor]] = {}
        self.extra: dict[str, Tensor] = {}
        self.large = are_large(block_linears(model).values())
        self.unsaved: list[int] = []
        self.started, self.saves = time.perf_counter(), Saves()
        if self.folder and self.folder.is_dir():
            self._restore()

    def remaining(self, doing: str) -> Iterator[tuple[int, nn.Module]]:
        """The blocks that are not done, each with its number; the progress bar says what is done to them."""
        for index, block in enumerate(self.log.progress(self.blocks, doing, "block")):
            if index >= self.done:
                yield index, block

    def finished(self, block: int, **streams: list[Tensor]) -> None:
        """Note that a block is done and what enters the next one; write it if a minute has gone by. The layers of a large
        model are written each time, and stay in the file from then on."""
        if not self.folder or not quantized_layers(self.blocks[block]):
            return
        self.unsaved.append(block)
        due = self.saves.due()
        if due or self.large:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"layers-{block:05}.safetensors"
            _save_layers(self.model, [f"{self.prefix}.{b}" for b in self.unsaved], path)
            self.unsaved = []
            if self.large:
                _restore_layers(self.model, *read_sealed(path))
        if due:
            with self.saves.saving():
                self._save_streams(block, streams)

    def _save_streams(self, block: int, streams: dict[str, list[Tensor]]) -> None:
        tensors = {f"{name}.{i}": t for name, batches in streams.items() for i, t in enumerate(batches)}
        tensors |= {f"extra.{name}": t for name, t in self.extra.items()}
        facts = {
            "done": block + 1,
            "files": sorted(path.name for path in self.folder.glob(LAYERS)),
            "layers": self.log.layers,
            "departures": self.log.departures,
            "seconds": self.log.seconds,
            "earlier_seconds": self.log.earlier_seconds + time.perf_counter() - self.started,
        }
        # Last: what it does not count is not there.
        write_sealed(self.folder / STREAMS, tensors, {"facts": json.dumps(facts)})

    def _restore(self) -> None:
        """Go on where the state says; from the start, without it and all layers that it counts."""
        state = read_state(self.folder / STREAMS)
        facts = json.loads(state[1]["facts"]) if state else {"files": []}
        layers = [read_state(self.folder / name) for name in facts["files"]]
        if state is None or None in layers:
            shutil.rmtree(self.folder)
            return
        for path in self.folder.glob(LAYERS):
            if path.name not in facts["files"]:
                path.unlink()  # of blocks that will be done again, and divided among files in another way
        for saved in layers:
            _restore_layers(self.model, *saved)
        tensors = state[0]
        for key in sorted(tensors, key=lambda key: (len(key), key)):  # batch 10 after batch 9
            name, _, last = key.rpartition(".")
            if name == "extra":
                self.extra[last] = tensors[key]
            else:
                self.streams.setdefault(name, []).append(tensors[key])
        self.done = facts["done"]
        self.log.layers.update(facts["layers"])
        self.log.departures += [d for d in facts["departures"] if d not in self.log.departures]
        self.log.seconds.update(facts["seconds"])
        self.log.earlier_seconds = facts["earlier_seconds"]
        self.log.info(f"resuming after {self.done} blocks")


PARTS = ("packed", "scale", "zero_point", "residual")


def _save_layers(model: nn.Module, blocks: list[str], path: Path) -> None:
    """Write the quantized layers of some blocks, and their formats."""
    tensors, formats = {}, {}
    for block in blocks:
        for name, layer in quantized_layers(model.get_submodule(block)).items():
            form, full = layer.format, f"{block}.{name}"
            formats[full] = [form.name, form.bits, form.group_size, form.symmetric, dtype_name(form.scale_dtype)]
            tensors |= {f"{full}:{part}": t for part in PARTS if (t := getattr(layer, part)) is not None}
    write_sealed(path, tensors, {"formats": json.dumps(formats)})


def _restore_layers(model: nn.Module, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    for name, (kind, bits, group_size, symmetric, dtype) in json.loads(facts["formats"]).items():
        parts = {part: tensors[f"{name}:{part}"] for part in PARTS if f"{name}:{part}" in tensors}
        form = make(kind, bits, group_size, symmetric, getattr(torch, dtype))
        linear = model.get_submodule(name)
        shape = torch.Size((linear.out_features, linear.in_features))
        packed = Packed(parts["packed"], shape, parts["scale"], parts.get("zero_point"), form)
        layer = QuantizedLinear.replacing(linear, packed)
        layer.residual = parts.get("residual")
        replace_module(model, name, layer)

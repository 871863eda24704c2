"""What a method that goes block by block has done so far, kept in files while it goes: one that is killed loses a minute or a
block, whichever is longer, and ends with the same numbers as if it had not been. Of a large model, blocks that are done are
in these files only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from methods.core.formats import Packed, make
from methods.core.job import ranks
from methods.core.job.files import atomic_path
from methods.core.job.log import RunLog
from methods.core.job.runtime import dtype_name
from methods.core.model.anatomy import block_linears, decoder_blocks, replace_module
from methods.core.model.layers import QuantizedLinear, are_large, quantized_layers

SAVE_SECONDS = 60  # between two states, at least


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
        self.started = self.saved = time.perf_counter()
        if self.folder and (self.folder / "streams.safetensors").is_file():
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
        due = time.perf_counter() - self.saved >= SAVE_SECONDS
        if due or self.large:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"layers-{block:05}.safetensors"
            _save_layers(self.model, [f"{self.prefix}.{b}" for b in self.unsaved], path)
            self.unsaved = []
            if self.large:
                _restore_layers(self.model, path)
        if due:
            self._save_streams(block, streams)
            self.saved = time.perf_counter()

    def _save_streams(self, block: int, streams: dict[str, list[Tensor]]) -> None:
        tensors = {f"{name}.{i}": t for name, batches in streams.items() for i, t in enumerate(batches)}
        tensors |= {f"extra.{name}": t for name, t in self.extra.items()}
        facts = {
            "done": block + 1,
            "layers": self.log.layers,
            "departures": self.log.departures,
            "seconds": self.log.seconds,
            "earlier_seconds": self.log.earlier_seconds + time.perf_counter() - self.started,
        }
        # Last: what it does not count is not there.
        with atomic_path(self.folder / "streams.safetensors") as temporary:
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata={"facts": json.dumps(facts)})

    def _restore(self) -> None:
        with safe_open(self.folder / "streams.safetensors", framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            for key in sorted(file.keys(), key=lambda key: (len(key), key)):  # batch 10 after batch 9
                name, _, last = key.rpartition(".")
                if name == "extra":
                    self.extra[last] = file.get_tensor(key)
                else:
                    self.streams.setdefault(name, []).append(file.get_tensor(key))
        self.done = facts["done"]
        for path in sorted(self.folder.glob("layers-*.safetensors")):
            if int(path.stem.removeprefix("layers-")) < self.done:
                _restore_layers(self.model, path)
            else:
                path.unlink()  # of blocks that will be done again, and divided among files in another way
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
    with atomic_path(path) as temporary:
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata={"formats": json.dumps(formats)})


def _restore_layers(model: nn.Module, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name, (kind, bits, group_size, symmetric, dtype) in json.loads(file.metadata()["formats"]).items():
            parts = {part: file.get_tensor(f"{name}:{part}") for part in PARTS if f"{name}:{part}" in file.keys()}
            form = make(kind, bits, group_size, symmetric, getattr(torch, dtype))
            linear = model.get_submodule(name)
            shape = torch.Size((linear.out_features, linear.in_features))
            packed = Packed(parts["packed"], shape, parts["scale"], parts.get("zero_point"), form)
            layer = QuantizedLinear.replacing(linear, packed)
            layer.residual = parts.get("residual")
            replace_module(model, name, layer)

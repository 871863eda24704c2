"""What runs a checkpoint's forward passes while it is timed: PyTorch in this process, or llama.cpp in one of its own.

An engine has these, whose seconds are counted by who calls them:

    prefill(ids)      go through the prompts (batch, tokens), and choose the next token of each
    decode(steps)     so many greedy steps after it; returns the tokens chosen last (batch, 1)
    logits(ids)       of one prompt: those of all its tokens but the last, and those of a step with the last, fp32
    bytes_read        of weights in a step: all but the embedding, of which a step reads only some rows
    itemsize          bytes of the numbers that its layers multiply
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evals.core.kernels import NoKernel
from methods.core.job.files import read_json
from methods.core.model import gguf

LOG_ERROR = 4  # ggml.h's level of errors; the package has no name for it


class Torch:
    """A model of transformers. itemsize is that of its activations."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model, self.itemsize = model, dtype.itemsize
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if embedding.data_ptr() != head.data_ptr():
            tensors.pop(embedding.data_ptr())
        self.bytes_read = sum(t.numel() * t.element_size() for t in tensors.values())
        self.cache, self.next = None, torch.empty(0)

    def prefill(self, ids: Tensor) -> None:
        self.cache = None
        self._forward(ids)

    def decode(self, steps: int) -> Tensor:
        for _ in range(steps):
            self._forward(self.next)
        return self.next

    def _forward(self, tokens: Tensor) -> None:
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def logits(self, ids: Tensor) -> list[Tensor]:
        out = self.model(input_ids=ids[:, :-1], use_cache=True)
        step = self.model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        return [out.logits[0].float(), step.logits[0].float()]


def export_for_llama_cpp(checkpoint: Path, folder: Path) -> Path:
    """Export a checkpoint, quantized or not, and return the file. NoKernel if the format cannot hold it."""
    config = read_json(checkpoint / "config.json")
    try:
        (gguf.check if "quantization_config" in config else gguf.check_model)(checkpoint, config)
        gguf.write(checkpoint, folder, checkpoint.name)
    except ValueError as error:
        raise NoKernel(str(error)) from None
    return folder / gguf.FILE


class LlamaCpp:
    """llama.cpp on a GGUF file, on the processor, in a process of its own, so that its threads and PyTorch's do not wait for
    each other by spinning. Seconds include that process's answer, some tenths of a millisecond.

    It multiplies codes with activations that it rounds to 8 bits, other matrices as they are stored. `sequences` of `length`
    tokens fit its cache. Close it; it ends with this process in any case. NoKernel, with llama.cpp's reason, for a file that
    it cannot load.
    """

    def __init__(self, file: Path, sequences: int, length: int, threads: int):
        from gguf import GGUFReader

        tensors = GGUFReader(file).tensors
        tied = all(tensor.name != "output.weight" for tensor in tensors)
        read = [tensor for tensor in tensors if tied or tensor.name != "token_embd.weight"]
        self.bytes_read = sum(int(tensor.n_bytes) for tensor in read)
        sizes = Counter()
        for tensor in read:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        self.types = ", ".join(name for name, _ in sizes.most_common() if name != "F32" or len(sizes) == 1)
        self.itemsize = {"F32": 4, "F16": 2, "BF16": 2}.get(sizes.most_common(1)[0][0], 1)
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent)
        try:
            self.build = self._call(_load, str(file), sequences, length, threads)
        except BaseException:
            self.close()
            raise

    def prefill(self, ids: Tensor) -> None:
        self._call(_prefill, ids.tolist())

    def decode(self, steps: int) -> Tensor:
        return torch.tensor(self._call(_decode, steps))

    def logits(self, ids: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in self._call(_logits, ids[0].tolist())]

    def close(self) -> None:
        self.pool.shutdown()

    def _call(self, function, *arguments) -> Any:
        """RuntimeError if its process has ended."""
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError("the process of llama.cpp has ended; it may have been killed for its memory") from None


# What follows runs in llama.cpp's process, which has one model.


def _end_with_parent() -> None:
    """Else this process, waiting for its next call, would stay for ever if the other was killed."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Program:
    def __init__(self, file: str, sequences: int, length: int, threads: int):
        import llama_cpp as library

        self.library, self.errors = library, []
        self.log = library.llama_log_callback(self._keep_error)  # held, since C calls it
        library.llama_log_set(self.log, None)
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = library.llama_model_load_from_file(file.encode(), parameters)
        if not self.model:
            raise NoKernel(f"llama.cpp could not load the export: {self.reason}")
        parameters = library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = sequences * length
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.offload_kqv = parameters.op_offload = False
        self.context = library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise NoKernel(f"llama.cpp could not make room for {sequences} sequences of {length} tokens: {self.reason}")
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        self.batch = library.llama_batch_init(sequences * length, 0, 1)
        self.position, self.next = 0, []

    def _keep_error(self, level: int, text: bytes, _) -> None:
        if level == LOG_ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    @property
    def reason(self) -> str:
        return "; ".join(self.errors) or "it gave no reason"

    def forget(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
        self.position = 0

    def forward(self, ids: list[list[int]], every: bool = False) -> list[np.ndarray]:
        """Logits (vocabulary,) of the last token of each sequence, or of every token; they are llama.cpp's own memory, until
        the next forward pass."""
        length, wanted = len(ids[0]), []
        places = [(sequence, i) for sequence in range(len(ids)) for i in range(length)]
        for place, (sequence, i) in enumerate(places):
            self.batch.token[place], self.batch.pos[place] = ids[sequence][i], self.position + i
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, sequence
            self.batch.logits[place] = every or i == length - 1
            if self.batch.logits[place]:
                wanted.append(place)
        self.batch.n_tokens = len(places)
        if status := self.library.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode of {len(places)} tokens returned {status}: {self.reason}")
        self.position += length
        rows = [self.library.llama_get_logits_ith(self.context, place) for place in wanted]
        return [np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows]

    def choose(self, ids: list[list[int]]) -> None:
        self.next = [[int(row.argmax())] for row in self.forward(ids)]


_program: _Program


def _load(file: str, sequences: int, length: int, threads: int) -> str:
    """What llama.cpp was compiled for."""
    global _program
    _program = _Program(file, sequences, length, threads)
    return _program.library.llama_print_system_info().decode()


def _prefill(ids: list[list[int]]) -> None:
    _program.forget()
    _program.choose(ids)


def _decode(steps: int) -> list[list[int]]:
    for _ in range(steps):
        _program.choose(_program.next)
    return _program.next


def _logits(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    _program.forget()
    return np.stack(_program.forward([ids[:-1]], every=True)), np.stack(_program.forward([ids[-1:]]))

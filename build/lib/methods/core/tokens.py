"""Token files: one stream of ids per text and tokenizer, written once, cut into windows by whoever needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from methods.core.files import atomic_path


def write_tokens(path: str | Path, ids: Tensor, info: dict[str, str]) -> None:
    """Store a stream (tokens,) of ids with what is known about it (text hash, tokenizer hash, ...)."""
    with atomic_path(path) as temporary:
        save_file({"input_ids": ids.to(torch.int32)}, temporary, metadata=info)


def read_tokens(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """The stream (tokens,) int32, and what is known about it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("input_ids"), dict(file.metadata())


def read_windows(path: str | Path, length: int) -> tuple[Tensor, dict[str, str]]:
    """The stream as disjoint windows (windows, length) int64, its tail dropped, and its info. ValueError if too short."""
    ids, info = read_tokens(path)
    if len(ids) < length:
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than one window of {length}")
    return ids[: len(ids) // length * length].view(-1, length).long(), info


def check_length(model, length: int, what: str) -> None:
    """ValueError if `length` tokens, which are called `what`, are more than the model's context."""
    context = model.config.get_text_config().max_position_embeddings
    if length > context:
        raise ValueError(f"{what} is {length}, longer than the model's context of {context} tokens")


def sample_windows(path: str | Path, samples: int, length: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """`samples` distinct windows of the stream in an order given by `seed`, and what to record about them."""
    windows, info = read_windows(path, length)
    if samples > len(windows):
        raise ValueError(
            f"{path} has {len(windows)} windows of {length} tokens, fewer than the {samples} samples asked for"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]], info | {"samples": samples, "sequence_length": length}

"""Tensors in a file of safetensors that has their hash, so that what was damaged is not computed with."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from methods.core.job.files import SEAL, atomic_path


def write_sealed(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors and facts about them, all or nothing."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={**facts, SEAL: _seal(tensors, facts)})


def read_sealed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a file, which other programs may have written without a hash. ValueError if they are damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    seal = facts.pop(SEAL, None)
    if seal not in (None, _seal(tensors, facts)):
        raise ValueError(f"{path} has been changed or damaged since it was written: its {SEAL!r} is of other contents")
    return tensors, facts


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The same of a state that a job goes on from; None if there is none, or one that is damaged."""
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f"{error}; what it had is done again", file=sys.stderr)
        return None


def _seal(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

"""Processes of one job that share its tokens, each with a device of its own. torchrun starts them, torch.distributed connects
them; without torchrun there is one, and nothing here does anything.

All of them do the same. What is a sum over tokens (a gradient, a Hessian) is computed of each one's share and added up, so
that any number of processes does the same sums but for their order. Each holds the whole model, unless a training divides it
(training/sharding.py). The first one, which `leads`, writes the files.

No torch is imported before `connect`.
"""

from __future__ import annotations

import atexit
import datetime
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = datetime.timedelta(hours=2)  # in which the first process may hash and write what all have


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def leads() -> bool:
    return rank() == 0


def passes(accumulation: int, processes: int) -> int:
    """Forward passes of a training step that so many processes can share: as many as asked for, or a multiple of them."""
    return math.lcm(accumulation, processes)


def equal_shares(amount: Mapping[str, int], processes: int) -> bool:
    """Whether so many processes can share the sequences of a training step, or of a calibration, equally.

    amount: `samples`, and of a training `accumulation` and `batch_size`.
    """
    if "batch_size" in amount:
        return amount["accumulation"] * amount["batch_size"] % passes(amount["accumulation"], processes) == 0
    return amount.get("samples", 0) % processes == 0


def connect() -> None:
    """Join the other processes, on the GPU of this one's number if there are GPUs."""
    if count() == 1:
        return
    import torch
    from torch import distributed

    from methods.core.job.runtime import device

    gpu = device().type == "cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    atexit.register(distributed.destroy_process_group)


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        from torch import distributed

        distributed.barrier()


def agree(wish: bool) -> bool:
    """What the first process wishes, which all must ask for."""
    if count() == 1:
        return wish
    from torch import distributed

    wishes = [wish]
    distributed.broadcast_object_list(wishes)
    return wishes[0]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; all are of one dtype and travel together."""
    if count() == 1:
        return
    import torch
    from torch import distributed

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def share(items: Tensor) -> Tensor:
    """This process's part of the items along the first dimension, whose number `count` divides."""
    return items[rank() :: count()]

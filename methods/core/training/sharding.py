"""A model divided among the processes of a training: FSDP2, `torch.distributed.fsdp.fully_shard`.

Each process holds a part of every parameter, trained or frozen, and of the moments of those that are trained. While a decoder
block computes, forward and backward, its parameters are whole on all of them; gradients are summed, and each process keeps
its part. So the sums are those of processes that hold everything (job/ranks.py), with less memory and more traffic.

Buffers are not divided. What is large and frozen is therefore a parameter without gradient: `frozen`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from methods.core.job import ranks
from methods.core.job.runtime import device
from methods.core.model.anatomy import block_linears, decoder_blocks


def frozen(tensor: Tensor) -> nn.Parameter:
    """A tensor of any dtype as a parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def divide(module: nn.Module, trained: bool = True) -> None:
    """Divide the parameters of a module among the processes, but for those of modules in it that are divided already.

    A whole model that is not trained is divided again after each forward pass; of one that is, what is outside its blocks
    stays whole until the backward pass. RuntimeError for a torch that cannot divide frozen integers.
    """
    from torch.distributed.fsdp import fully_shard

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        raise RuntimeError(f"a model is divided among processes by torch 2.13 or newer; this is {torch.__version__}")
    fully_shard(module, mesh=_mesh(), reshard_after_forward=None if trained else True)
    module.set_gradient_divide_factor(1.0)  # a sum, as a loss is divided by the passes of all processes
    module.set_force_sum_reduction_for_comms(True)  # gloo has no other


@cache
def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device().type, (ranks.count(),))


def on_device(model: nn.Module) -> nn.Module:
    """A model that is not trained, on the device; divided if there are several processes."""
    if ranks.count() == 1:
        return model.to(device())
    for module in (*decoder_blocks(model)[1], model):
        divide(module, trained=False)
    return model


def is_divided(what: nn.Module | Tensor) -> bool:
    return hasattr(what, "unshard") or hasattr(what, "placements")


def shell(model: nn.Module) -> nn.Module:
    """The model without the linear layers of its blocks; its other tensors are the model's, and stay where they are."""
    memo: dict[int, object] = {id(linear): nn.Identity() for linear in block_linears(model).values()}
    memo |= {id(p): frozen(p.detach()) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def whole_blocks(model: nn.Module) -> Iterator[str]:
    """The name of each decoder block of a divided model, whose parameters are whole until the next is asked for."""
    prefix, blocks = decoder_blocks(model)
    for number, block in enumerate(blocks):
        block.unshard()
        yield f"{prefix}.{number}"
        block.reshard()


def part(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor; any other as it is."""
    return tensor.to_local() if is_divided(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor as one, which all processes must ask for; any other as it is."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def divided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that each process has, on the device of `other`, and divided if that one is."""
    tensor = tensor.to(other.device)
    if not is_divided(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)

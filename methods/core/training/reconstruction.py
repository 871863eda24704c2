"""Training block by block: each decoder block learns to give the outputs that it had in full precision.

The loop of AutoRound and Block-AP, which differ in what they train and how they step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.runtime import device
from methods.core.model.anatomy import linears_in
from methods.core.model.blocks import Block, blocks_with_targets
from methods.core.model.resume import Resume
from methods.core.training.flops import counter
from methods.core.training.layers import TrainedLinear, fold, put
from methods.core.training.loop import Schedule, subsample
from methods.core.training.parametrizations import Parametrization


def reconstruct(
    model: nn.Module,
    make: Callable[[str, nn.Module], TrainedLinear],
    groups: Callable[[Parametrization], list[dict]],
    optimizer: Callable[[list[dict]], torch.optim.Optimizer],
    tokens: Tensor,
    *,
    steps: int,
    batch_size: int,
    schedule: Schedule,
    keep_best: bool,
    log: RunLog,
) -> tuple[int, float, int]:
    """Train the linear layers of one decoder block after the other, and put what they fold to in their place.

    The loss is the squared error of the block's output relative to full precision's, see `_loss`; the block's inputs are
    those of the model as it is by then. make: as for `train_weights`. groups: of a parametrization, the optimizer's parameter
    groups ({"params", "lr"}). optimizer: of all groups of a block. tokens: (samples, sequence) ids, of which each step takes
    a batch, every batch equally often. keep_best: end with the parameters of the step whose loss, relative to the start's on
    the same batch, was the lowest; else with those of the last step. A block whose error over all batches is then larger than
    at the start has the start's parameters, as happens at 8 bits, and the log a departure.

    Returns how many parameters were trained, what share of a sample of them moved, and the floating-point operations of all
    steps (flops.py). Logs the share of the start's error that is left in each block, `block_error`.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    resume = Resume(model, log)
    if resume.done:
        generator.set_state(resume.extra["generator"])
    count, sampled, moved, flops = resume.extra.get("totals", torch.zeros(4, dtype=torch.int64)).tolist()
    for block in blocks_with_targets(model, tokens, resume, batch_size=batch_size, device=device(), log=log):
        layers = put(model, [f"{block.name}.{name}" for name in linears_in(block.module)], make)
        of_block = [group for layer in layers.values() for group in groups(layer.parametrization)]
        for group in of_block:
            for p in group["params"]:
                p.requires_grad_(True)
        parameters = [p for group in of_block for p in group["params"]]
        starts = [subsample(p) for p in parameters]
        before, after, of_a_step = _train_block(block, optimizer(of_block), steps, schedule, keep_best, generator)
        flops += of_a_step * steps
        count += sum(p.numel() for p in parameters)
        for p, start in zip(parameters, starts, strict=True):
            sampled += start.numel()
            moved += int((subsample(p) != start).sum())
        for name in layers:
            log.layer(name, block_error=min(after, before) / before if before else 1.0)
        if after > before:
            log.departure(f"{block.name}: training made it worse, so it stays as it started; lower the learning rate")
        fold(model, layers, log)
        resume.extra = {"generator": generator.get_state(), "totals": torch.tensor([count, sampled, moved, flops])}
    return count, moved / sampled, flops


def _train_block(
    block: Block,
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: Schedule,
    keep_best: bool,
    generator: torch.Generator,
) -> tuple[float, float, int]:
    """Train in place; the mean loss over all batches before and after, and the floating-point operations of a step. A block
    that training makes worse has the start's parameters again.

    FloatingPointError if a loss is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    start, flops = _losses(block), _flops(block, optimizer)
    first = [p.detach().clone() for p in parameters]
    best, kept = 1.0, [p.clone() for p in first] if keep_best else []
    for step, batch in enumerate(_order(len(block.inputs), steps, generator)):
        loss = _loss(block, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{block.name}: the loss is {value} at step {step} of {steps}; lower the learning rate"
            )
        if keep_best and start[batch] and value / start[batch] < best:
            best = value / start[batch]
            _copy(parameters, kept)
        loss.backward()
        schedule.apply(optimizer, rates, step, steps)
        optimizer.step()
        optimizer.zero_grad()
    if keep_best:
        _copy(kept, parameters)
    end = _losses(block)
    if sum(end) > sum(start):
        _copy(first, parameters)
    return sum(start) / len(start), sum(end) / len(end), flops


@torch.no_grad()
def _copy(values: list[Tensor], into: list[Tensor]) -> None:
    for value, place in zip(values, into, strict=True):
        place.copy_(value)


def _flops(block: Block, optimizer: torch.optim.Optimizer) -> int:
    """Floating-point operations of a step. It is one of its own, since torch takes other kernels while it counts."""
    with counter() as counted:
        _loss(block, 0).backward()
    optimizer.zero_grad()
    return counted.get_total_flops()


def _order(batches: int, steps: int, generator: torch.Generator) -> list[int]:
    """The batch of each step: all in a random order, again and again."""
    rounds = -(-steps // batches)
    return (
        torch.cat([torch.randperm(batches, generator=generator) for _ in range(rounds)])[:steps].tolist()
        if steps
        else []
    )


def _loss(block: Block, batch: int) -> Tensor:
    """Squared error of the block's output relative to that output's square in full precision, fp32: half that of the whole
    batch, half the mean of its tokens' own.

    The papers' is the first. In many models the first token's hidden states are a hundred times as large as the others' from
    some block on (arXiv 2402.17762); of the sum over all tokens it then is nearly all, and no other is trained: alone it is
    2 to 10 % worse. The second alone is level over a whole model; in the first blocks, where some tokens are a little larger
    and others attend to them, it is behind (reports/LOG.md).
    """
    output = block.forwards[batch](block.inputs[batch]).float()
    target = block.targets[batch].to(output.device).float()
    error, size = (output - target).square().mean(-1), target.square().mean(-1)
    whole = size.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (error.mean() / whole + (error / size.clamp(min=1e-6 * whole)).mean()) / 2  # a token of zeros has no size


@torch.no_grad()
def _losses(block: Block) -> list[float]:
    return [_loss(block, batch).item() for batch in range(len(block.inputs))]

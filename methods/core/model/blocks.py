"""The decoder blocks of a model one after the other, each as a function of its hidden states.

One block at a time is on the device, so the model may be larger than the accelerator's memory; the hidden states of all
tokens stay in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.model.anatomy import decoder_blocks
from methods.core.model.resume import Resume

Forward = Callable[[Tensor], Tensor]  # a block, of hidden states (batch, sequence, width)


@dataclass
class Block:
    """A decoder block and what it is to reproduce.

    forwards: the block as a function, by batch. inputs: the hidden states that enter it now, after the blocks before it as
    they are by then; targets: what left it in the model as it was. Both by batch, (batch, sequence, width), on the host.
    """

    name: str
    module: nn.Module
    forwards: list[Forward]
    inputs: list[Tensor]
    targets: list[Tensor]


def blocks_with_targets(
    model: nn.Module, tokens: Tensor, resume: Resume, *, batch_size: int, device: torch.device, log: RunLog
) -> Iterator[Block]:
    """The decoder blocks in order, to be changed in place before the next is asked for.

    tokens: (samples, sequence) token ids. resume: what a run that was killed has done. Adds seconds "calibration_forward" to
    the log.
    """
    prefix, blocks = decoder_blocks(model)
    with log.timer("calibration_forward"):
        inputs, arguments = block_inputs(model, blocks, tokens, batch_size)
    originals = list(inputs)
    if resume.done:
        inputs, originals = resume.streams["inputs"], resume.streams["originals"]
    for index, module in resume.remaining("reconstructing blocks"):
        module.to(device)
        forwards = [block_function(module, given, device) for given in arguments[index]]
        originals = _outputs(forwards, originals, log)
        yield Block(f"{prefix}.{index}", module, forwards, inputs, originals)
        inputs = _outputs(forwards, inputs, log)
        module.to("cpu")
        resume.finished(index, inputs=inputs, originals=originals)


@torch.no_grad()
def _outputs(forwards: list[Forward], inputs: list[Tensor], log: RunLog) -> list[Tensor]:
    with log.timer("calibration_forward"):
        return [forward(x).cpu() for forward, x in zip(forwards, inputs, strict=True)]


def block_function(block: nn.Module, arguments: tuple[tuple, dict], device: torch.device) -> Forward:
    """The block as a function of a batch's hidden states, with that batch's further arguments: positions, masks.

    It takes them from anywhere and leaves what it makes of them on the device.
    """
    args, kwargs = _on(device, arguments)

    def forward(hidden: Tensor) -> Tensor:
        return block(hidden.to(device), *args, **kwargs)

    return forward


def _on(device: torch.device, value):
    """The same nested arguments with every tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_on(device, v) for v in value)
    if isinstance(value, dict):
        return {k: _on(device, v) for k, v in value.items()}
    return value


@torch.no_grad()
def block_inputs(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, batch_size: int
) -> tuple[list[Tensor], list[list[tuple[tuple, dict]]]]:
    """Hidden states that enter the first block, by batch, and the further arguments of every block, by block and batch.

    The blocks are switched off for this: each notes its arguments and passes the hidden states on. Blocks may differ
    in their arguments (sliding and full attention masks), and so may batches.
    """
    hidden: list[Tensor] = []
    arguments: list[list[tuple[tuple, dict]]] = [[] for _ in blocks]

    def recorder(index: int):
        def forward(hidden_states: Tensor, *args, **kwargs) -> Tensor:
            if index == 0:
                hidden.append(hidden_states)
            arguments[index].append((args, kwargs))
            if index == len(blocks) - 1:
                raise _Reached
            return hidden_states

        return forward

    own = [block.__dict__.get("forward") for block in blocks]  # gradient checkpointing has put one there
    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        for batch in tokens.split(batch_size):
            try:
                model.base_model(input_ids=batch, use_cache=False)
            except _Reached:
                pass
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
    return hidden, arguments


class _Reached(Exception):
    """The last block has been reached; what comes after it is not needed."""

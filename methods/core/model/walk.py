"""Walking a model block by block with calibration tokens, changing its layers on the way.

    for block in walk(model, tokens, ...):
        for stage in block:
            stage.replace({name: quantized(layer, stage.inputs) for name, layer in stage.layers.items()})

Linear layers of a block that receive the same tensor form a *stage* ({q, k, v}, {o}, {gate, up}, {down} in a Llama block).
The inputs of a block come from the blocks before it as they are by then; with `sequential`, so do those of a stage from the
stages before it.

One decoder block at a time is on the device, so the model may be larger than the accelerator's memory. The hidden states of
all calibration tokens stay in the memory of the host, the inputs of one stage on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from greenlet import greenlet
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.model.activations import fake_quantize_tokens
from methods.core.model.anatomy import decoder_blocks, hooked, linears_in, replace_module
from methods.core.model.blocks import Forward, block_function, block_inputs
from methods.core.model.experts import is_expert
from methods.core.model.resume import Resume


@dataclass
class Stage:
    """Layers of a block that share an input.

    inputs: what they receive, by batch (batch, sequence, in), of an expert (tokens, in); under a scheme with activations,
    rounded as they will be.
    full_precision_inputs: what they receive in the model as it was; empty unless the walk was asked for them, and for
    experts, to which other tokens may go there.
    """

    layers: dict[str, nn.Linear]  # by qualified name
    inputs: list[Tensor]
    full_precision_inputs: list[Tensor] = field(default_factory=list)
    replacements: dict[str, nn.Module] = field(default_factory=dict)

    def replace(self, layers: dict[str, nn.Module]) -> None:
        """Put these in the place of the layers of that name, as soon as the walk allows it."""
        self.replacements |= layers


def walk(
    model: nn.Module,
    tokens: Tensor,
    *,
    batch_size: int,
    sequential: bool,
    device: torch.device,
    log: RunLog,
    full_precision: bool = False,
) -> Iterator[Iterator[Stage]]:
    """The decoder blocks in order, each an iterator over its stages; a block must be iterated before the next is asked for.

    tokens: (samples, sequence) calibration token ids. sequential: whether a stage sees what replaced the stages before it; if
    not, a block's layers are replaced when its stages are through. full_precision: give each stage the inputs in the model as
    it was, too; this costs a second forward pass of every block. A walk that was killed goes on where it was (resume.py), if
    its blocks become quantized. Adds seconds "calibration_forward" to the log.
    """
    prefix, blocks = decoder_blocks(model)
    with log.timer("calibration_forward"):
        hidden, arguments = block_inputs(model, blocks, tokens, batch_size)
    original = list(hidden) if full_precision else None
    resume = Resume(model, log)
    if resume.done:
        hidden, original = resume.streams["hidden"], resume.streams.get("original")
    stages_of: dict[tuple[str, ...], list[list[str]]] = {}
    for index, block in resume.remaining("quantizing blocks"):
        block.to(device)
        forwards = [block_function(block, given, device) for given in arguments[index]]
        linears = tuple(linears_in(block))
        if linears not in stages_of:
            stages_of[linears] = find_stages(forwards[0], block, hidden[0], linears)
        stages = stages_of[linears]
        observed: list[list[Tensor]] = [[] for _ in stages]
        if original is not None:
            with log.timer("calibration_forward"):
                original = _observe(forwards, block, original, stages, observed)
        outputs: list[Tensor] = []
        names = [{name: f"{prefix}.{index}.{name}" for name in stage} for stage in stages]
        yield _stages(model, forwards, block, hidden, names, observed, sequential, outputs, log)
        if not outputs:
            raise RuntimeError(f"block {index} was not iterated to its end")
        hidden = outputs
        block.to("cpu")
        resume.finished(index, hidden=hidden, **({} if original is None else {"original": original}))


def _stages(
    model: nn.Module,
    forwards: list[Forward],
    block: nn.Module,
    hidden: list[Tensor],
    names: list[dict[str, str]],
    observed: list[list[Tensor]],
    sequential: bool,
    outputs: list[Tensor],
    log: RunLog,
) -> Iterator[Stage]:
    """The stages of a block; `outputs` is filled with its output by batch at the end. names: by stage, name in the block to
    qualified name.

    The naive way repeats the block's forward pass for every stage. Here each batch's forward pass runs in a greenlet, a
    function that can be left in the middle and entered again. The first layer of a stage, its *leader*, is patched: called
    with an input, it hands the input to whoever entered the greenlet and waits there. When all batches wait at a stage, their
    inputs are known; the caller replaces the layers; and the batches are entered again, compute the stage with what is there
    by then, and run on to the next leader. So a block is computed once however many stages it has.
    """
    leaders = [block.get_submodule(next(iter(stage))) for stage in names]
    for leader, stage in zip(leaders, names, strict=True):
        leader.forward = _pausing(block, next(iter(stage)), leader)
    batches = [greenlet(forward) for forward in forwards]
    entries: list[tuple] = [(h,) for h in hidden]  # the first entry passes the argument, later ones only resume
    later: dict[str, nn.Module] = {}
    try:
        for leader, stage, original in zip(leaders, names, observed, strict=True):
            with log.timer("calibration_forward"), torch.no_grad():
                inputs = [batch.switch(*entry) for batch, entry in zip(batches, entries, strict=True)]
                entries = [()] * len(batches)
                if (received := getattr(leader, "input_tokens", None)) is not None:
                    inputs = [fake_quantize_tokens(x, received) for x in inputs]
            layers = {qualified: block.get_submodule(name) for name, qualified in stage.items()}
            at = Stage(layers, inputs, original)
            yield at
            if sequential:
                _put(model, at.replacements)
            else:
                later |= at.replacements
        if sequential:
            with log.timer("calibration_forward"), torch.no_grad():
                outputs += [batch.switch().cpu() for batch in batches]
    finally:
        for leader in leaders:
            del leader.forward
    if not sequential:
        del batches  # what they would have computed is of the layers before
        _put(model, later)
        with log.timer("calibration_forward"), torch.no_grad():
            outputs += [forward(h).cpu() for forward, h in zip(forwards, hidden, strict=True)]


def _pausing(block: nn.Module, name: str, leader: nn.Linear) -> Forward:
    """A leader's forward pass that first hands its input to the greenlet's parent, and goes on when it is entered again."""

    def forward(x: Tensor) -> Tensor:
        greenlet.getcurrent().parent.switch(x)
        now = block.get_submodule(name)
        # The leader's own `forward` is this function: call the one of its class.
        return type(leader).forward(leader, x) if now is leader else now(x)

    return forward


def _put(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        replace_module(model, name, layer)


@torch.no_grad()
def _observe(
    forwards: list[Forward],
    block: nn.Module,
    hidden: list[Tensor],
    stages: list[list[str]],
    observed: list[list[Tensor]],
) -> list[Tensor]:
    """Outputs of a block by batch; its stages' inputs, but those of experts, are added to `observed`, in the memory of the
    host."""
    hooks = [
        block.get_submodule(stage[0]).register_forward_pre_hook(
            lambda _module, args, seen=seen: seen.append(args[0].cpu())
        )
        for stage, seen in zip(stages, observed, strict=True)
        if not is_expert(stage[0])
    ]
    with hooked(hooks):
        return [forward(h).cpu() for forward, h in zip(forwards, hidden, strict=True)]


@torch.no_grad()
def find_stages(forward: Forward, module: nn.Module, x: Tensor, linears: tuple[str, ...]) -> list[list[str]]:
    """Names of a module's linear layers, grouped by the very tensor they receive, in the order of `forward(x)`.

    ValueError for a layer that is not reached, or more than once.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str):
        def hook(_module, args):
            for tensor, stage in seen:
                if tensor is args[0]:
                    stage.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    hooks = [module.get_submodule(name).register_forward_pre_hook(note(name)) for name in linears]
    with hooked(hooks):
        forward(x)
    reached = [name for _, stage in seen for name in stage]
    if missing := set(linears) - set(reached):
        raise ValueError(
            f"calibration never reaches {sorted(missing)}: layers that only some tokens visit are unsupported"
        )
    if repeated := sorted({name for name in reached if reached.count(name) > 1}):
        raise ValueError(f"calibration reaches {repeated} more than once: layers with several inputs are unsupported")
    return [stage for _, stage in seen]

"""Walking a model block by block with calibration data, quantizing as we go.

Only one decoder block is on the device at a time, so the model may be larger than the accelerator's memory. The inputs
of a block come from the already quantized blocks before it. What does stay there is, for every calibration token, the
hidden state and the input of the stage at hand.

Inside a block, linear layers that receive the same tensor form a *stage* ({q, k, v}, {o}, {gate, up}, {down} in a Llama
block): they share one Hessian. With `sequential`, a stage's inputs come from the block's already quantized stages. The
naive way repeats the forward pass for every stage. Here each batch's forward pass is a greenlet that pauses when it
reaches a stage and goes on once the stage is quantized, so a block is computed once however many stages it has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from greenlet import greenlet
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.model.activations import fake_quantize_tokens
from methods.core.model.anatomy import decoder_blocks, replace_module

Layers = dict[str, nn.Linear]
Replace = Callable[[Layers, Tensor], dict[str, nn.Module]]


class Hessian:
    """`H = (2 / n) X^T X` over the rows of all inputs X (n, in) added; fp32, on the inputs' device."""

    def __init__(self, width: int, device: torch.device):
        self.sum = torch.zeros(width, width, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        self.rows += x.shape[0]
        # H is symmetric: the blocks below the diagonal are copied at the end, which saves a third of the work.
        for first in range(0, x.shape[1], 256):
            self.sum[first : first + 256, first:].addmm_(x[:, first : first + 256].T, x[:, first:])

    def value(self) -> Tensor:
        upper = self.sum.triu()
        return (upper + upper.triu(1).T) * (2 / self.rows)


def quantize_blocks(
    model: nn.Module,
    tokens: Tensor,
    replace: Replace,
    *,
    batch_size: int,
    sequential: bool,
    device: torch.device,
    log: RunLog,
) -> None:
    """Replace the linear layers of every decoder block, in place.

    tokens: (samples, sequence) calibration token ids. replace: receives one stage's layers by qualified name and their
    Hessian, returns the modules to put in their place. Adds seconds "calibration_forward", "hessian" and "solve" to log.
    """
    prefix, blocks = decoder_blocks(model)
    if len(tokens) % batch_size:
        # Batches share their positions and masks, so they must have one shape.
        raise ValueError(f"batch_size {batch_size} does not divide the {len(tokens)} calibration samples")
    with torch.no_grad():
        with log.timer("calibration_forward"):
            hidden, arguments = _block_inputs(model, blocks, tokens, batch_size)
        stages_of: dict[tuple[str, ...], list[list[str]]] = {}
        for index, block in enumerate(log.progress(blocks, "quantizing blocks", "block")):
            block.to(device)
            forward = _block_function(block, arguments[index], device)
            linears = tuple(name for name, m in block.named_modules() if isinstance(m, nn.Linear))
            if linears not in stages_of:
                stages_of[linears] = find_stages(forward, block, hidden[0], linears)

            def put(stage: list[str], hessian: Tensor, block=block, index=index) -> None:
                layers = {f"{prefix}.{index}.{name}": block.get_submodule(name) for name in stage}
                with log.timer("solve"):
                    for name, module in replace(layers, hessian).items():
                        replace_module(model, name, module)

            if sequential:
                hidden = _run(forward, block, hidden, stages_of[linears], put, log)
            else:
                # All Hessians come from the unquantized block; a second pass gives its quantized output.
                observed: list[tuple[list[str], Tensor]] = []
                _run(forward, block, hidden, stages_of[linears], lambda *seen, o=observed: o.append(seen), log)
                for stage, hessian in observed:
                    put(stage, hessian)
                with log.timer("calibration_forward"):
                    hidden = [forward(h) for h in hidden]
            block.to("cpu")


def _run(
    forward, block: nn.Module, hidden: list[Tensor], stages: list[list[str]], at_stage, log: RunLog
) -> list[Tensor]:
    """One forward pass of every batch, all of them paused at each stage while `at_stage(stage, hessian)` runs."""

    def pausing(name: str, linear: nn.Linear):
        def forward(x: Tensor) -> Tensor:
            greenlet.getcurrent().parent.switch(x)
            now = block.get_submodule(name)
            return type(linear).forward(linear, x) if now is linear else now(x)

        return forward

    leaders = [(stage[0], block.get_submodule(stage[0])) for stage in stages]
    for name, linear in leaders:
        linear.forward = pausing(name, linear)
    batches = [greenlet(forward) for _ in hidden]
    start = [(h,) for h in hidden]
    for stage, (_, leader) in zip(stages, leaders, strict=True):
        hessian = Hessian(leader.in_features, leader.weight.device)
        for batch, argument in zip(batches, start, strict=True):
            with log.timer("calibration_forward"):
                x = batch.switch(*argument)
            with log.timer("hessian"):
                # Of what the layer will receive: under a scheme with activations, of its quantized inputs.
                received = getattr(leader, "input_tokens", None)
                hessian.add(x if received is None else fake_quantize_tokens(x, received))
        start = [()] * len(batches)
        at_stage(stage, hessian.value())
    with log.timer("calibration_forward"):
        outputs = [batch.switch() for batch in batches]
    for _, linear in leaders:
        del linear.forward
    return outputs


def _block_function(block: nn.Module, arguments: tuple[tuple, dict], device: torch.device):
    """The block as a function of its hidden states; positions and masks are the same for every batch."""
    args, kwargs = _to(arguments, device)

    def forward(hidden: Tensor) -> Tensor:
        out = block(hidden.to(device), *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).cpu()

    return forward


def _to(value, device: torch.device):
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value


def _block_inputs(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, batch_size: int):
    """Hidden states that enter the first block, per batch, and the further arguments that each block is called with.

    The blocks are switched off for this: each notes its arguments and passes the hidden states on. Blocks may differ
    in their arguments (sliding and full attention masks), so each one's are kept.
    """
    hidden: list[Tensor] = []
    arguments: list[tuple[tuple, dict]] = [((), {})] * len(blocks)

    def recorder(index: int, as_tuple: bool):
        def forward(hidden_states, *args, **kwargs):
            if index == 0:
                hidden.append(hidden_states)
            arguments[index] = (args, kwargs)
            if index == len(blocks) - 1:
                raise _Recorded
            return (hidden_states,) if as_tuple else hidden_states

        return forward

    def record(batch: Tensor, as_tuple: bool) -> None:
        for index, block in enumerate(blocks):
            block.forward = recorder(index, as_tuple)
        try:
            model.base_model(input_ids=batch, use_cache=False)
        except _Recorded:
            pass

    try:
        for batch in tokens.split(batch_size):
            seen = len(hidden)
            try:
                record(batch, as_tuple=False)
            except (IndexError, TypeError, ValueError):
                # Older architectures take the hidden states out of a tuple that their blocks return.
                del hidden[seen:]
                record(batch, as_tuple=True)
    finally:
        for block in blocks:
            del block.forward
    return hidden, arguments


class _Recorded(Exception):
    """The last block has been reached; what comes after it is not needed."""


def find_stages(forward, module: nn.Module, x: Tensor, linears: tuple[str, ...]) -> list[list[str]]:
    """Names of a module's linear layers, grouped by the very tensor they receive, in the order of `forward(x)`."""
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
    try:
        forward(x)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := set(linears) - {name for _, stage in seen for name in stage}:
        raise ValueError(
            f"calibration never reaches {sorted(missing)}: layers that only some tokens visit are unsupported"
        )
    return [stage for _, stage in seen]

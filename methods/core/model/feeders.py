"""What feeds a linear layer, so that a factor for each of its input channels can be taken over: the same function with other
weights. Found in forward passes, not from names of architectures.

    y = W x = (W diag(f)) (x / f)

and `x / f` is what the feeder gives when its gain, if it is a norm, or its rows, if it is a linear layer, are divided by f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.model.anatomy import decoder_blocks, hooked, linears_in
from methods.core.model.experts import is_expert
from methods.core.model.function import probe, same_function
from methods.core.model.walk import Stage


def rescale(
    model: nn.Module,
    blocks: Iterable[Iterable[Stage]],
    factors: Callable[[Stage], Tensor],
    *,
    norms_only: bool,
    log: RunLog,
) -> None:
    """Multiply the input channels of layers by factors and divide what feeds them: the same function.

    blocks: a walk through the model. factors: (in,), positive, of layers that share an input. norms_only: leave layers alone
    that another linear layer feeds. Layers whose input nothing can take the factors over for stay as they are.
    ValueError if a norm that is to take them over is neither a LayerNorm nor an RMSNorm, if nothing can take over any, or if
    the model becomes another function.
    """
    prefix, _ = decoder_blocks(model)
    norms = {frozenset(layers): norm for norm, layers in read_norms(model).items()}
    linears = {} if norms_only else linear_feeders(model)
    found: list[tuple[str, list[str], Tensor]] = []
    count = skipped = 0
    for index, stages in enumerate(blocks):
        start = f"{prefix}.{index}."
        for stage in stages:
            names = list(stage.layers)
            count += 1
            feeder = norms.get(frozenset(names))
            if feeder is None and len(names) == 1 and not norms_only:
                feeder = _linear_feeder(names[0], start, linears)
            if not any(x.numel() for x in stage.inputs):
                log.departure(f"{', '.join(names)}: no calibration token reaches them; their inputs are not rescaled")
            elif feeder is not None:
                found.append((feeder, names, factors(stage).float().cpu()))
            elif is_expert(names[0]) and len(names) > 1:  # gate and up
                skipped += 1
    if skipped:
        log.departure(
            f"the inputs of {skipped} experts are not rescaled: one norm feeds all of a block, and its router"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__}: no norm or layer was found that could take over the factors of an input"
        )
    with same_function(model, log), torch.no_grad():
        for feeder, names, by in found:
            divide(model.get_submodule(feeder), by, feeder)
            for name in names:
                model.get_submodule(name).weight.mul_(by)
    log.info(f"{len(found)} of {count} inputs of layers rescaled; nothing takes over the factors of the others")


def _linear_feeder(name: str, block: str, found: dict[str, str]) -> str | None:
    """The linear layer that feeds the layer `name` of a block. found: by name in a block, those of the first."""
    if is_expert(name):  # the first block may have none, and a probe does not reach all
        return name.replace("down_proj", "up_proj") if name.endswith("down_proj") else None
    feeder = found.get(name.removeprefix(block))
    return feeder and block + feeder


def divide(feeder: nn.Module, factors: Tensor, name: str) -> None:
    """Divide what a norm or a linear layer gives, channel by channel. ValueError for another norm than these two."""
    if isinstance(feeder, nn.Linear | nn.LayerNorm):
        feeder.weight.div_(factors.unsqueeze(1) if isinstance(feeder, nn.Linear) else factors)
        if feeder.bias is not None:
            feeder.bias.div_(factors)
    else:
        set_norm_gain(feeder, norm_gain(feeder, name) / factors, name)


@torch.no_grad()
def read_norms(model: nn.Module) -> dict[str, list[str]]:
    """The linear layers, head included, that receive the output of a norm, by the norm's name; found in a forward pass.

    A norm is a module without children whose only parameters are vectors, a `weight` and perhaps a `bias`.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}  # by address; the tensors are kept, so that no address is used twice
    readers: dict[str, list[str]] = {}
    hooks = []

    def note(name: str):
        def hook(_module, _inputs, output):
            outputs[output.untyped_storage().data_ptr()] = (name, output)

        return hook

    def look(name: str):
        def hook(_module, inputs):
            source = outputs.get(inputs[0].untyped_storage().data_ptr())
            if source is not None and source[1].shape[-1] == inputs[0].shape[-1]:
                readers.setdefault(source[0], []).append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(look(name)))
        elif not list(module.children()) and _is_norm(module):
            hooks.append(module.register_forward_hook(note(name)))
    with hooked(hooks):
        model(input_ids=probe(model), use_cache=False)
    return readers


def _is_norm(module: nn.Module) -> bool:
    vectors = {name: p.dim() for name, p in module.named_parameters()}
    return vectors in ({"weight": 1}, {"weight": 1, "bias": 1})


@torch.no_grad()
def norm_gain(norm: nn.Module, name: str) -> Tensor:
    """What an RMSNorm multiplies by, (width,). ValueError if it is none."""
    width = len(norm.weight)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) * 8
    gain = norm(torch.full((1, width), 1e3))[0]  # large, so that the norm's epsilon does not count
    expected = x * x.square().mean(-1, keepdim=True).rsqrt() * gain
    if not torch.allclose(norm(x), expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"{name} is not an RMSNorm, and its gain cannot be moved into the layers after it")
    return gain


@torch.no_grad()
def set_norm_gain(norm: nn.Module, gain: Tensor, name: str) -> None:
    """Let an RMSNorm multiply by this. ValueError if it has neither `weight` nor `1 + weight` for its gain."""
    x = torch.full((1, len(gain)), 1e3)
    for one in (0.0, 1.0):
        norm.weight.copy_(gain - one)
        if torch.allclose(norm(x)[0], gain, rtol=1e-4):
            return
    raise ValueError(f"the gain of {name} cannot be set")


@torch.no_grad()
def linear_feeders(model: nn.Module) -> dict[str, str]:
    """For linear layers of the first block, by name in the block: the linear layer there that their input is proportional to,
    channel by channel. In a Llama block up feeds down, and v feeds o where each head has values of its own.

    Found by multiplying the outputs of each candidate by random factors and looking whose input follows.
    """
    block = decoder_blocks(model)[1][0]
    linears = linears_in(block)
    before = _inputs(model, linears)
    feeders = {}
    for name, candidate in linears.items():
        by = 0.5 + torch.rand(candidate.out_features, generator=torch.Generator().manual_seed(0))
        kept = {n: p.clone() for n, p in candidate.named_parameters()}
        divide(candidate, 1 / by, name)
        after = _inputs(model, linears)
        for n, p in candidate.named_parameters():
            p.copy_(kept[n])
        for other, x in before.items():
            if other == name or x.shape != after[other].shape:  # a router has sent other tokens to an expert
                continue
            if x.shape[-1] == len(by) and torch.allclose(after[other], x * by, rtol=1e-3, atol=1e-5):
                feeders[other] = name
    return feeders


def _inputs(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """What each of these layers receives in a forward pass of the probe."""
    seen: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _module, args, name=name: seen.update({name: args[0].clone()}))
        for name, linear in linears.items()
    ]
    with hooked(hooks):
        model(input_ids=probe(model), use_cache=False)
    return seen

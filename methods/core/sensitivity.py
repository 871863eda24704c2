"""What an error in a layer's weights costs the model's predictions: the distortions that bit allocation weighs.

Each estimator takes the model, its units (layers that share an input), token ids (samples, sequence), the scheme and a log,
and returns for each unit its distortion by bits; that of `fisher` and `kl` is the KL divergence from full precision, nats per
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.allocation import Unit
from methods.core.calibration import Hessian
from methods.core.grid import Grid
from methods.core.log import RunLog
from methods.core.modules import decoder_blocks
from methods.core.scheme import Scheme

Distortion = dict[int, float]
Rounding = Callable[[Tensor, Tensor, Grid], Tensor]  # weight (out, in), its inputs' Hessian, grid -> rounded weight
SEQUENCES = 2  # of the tokens, on which `kl` measures
MEASURABLE = 4  # bits; the divergence of one unit with more drowns in the rounding of the arithmetic


def fisher(model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: Scheme, log: RunLog) -> list[Distortion]:
    """`1/2 trace(F_l) / n_l * ||W - W_q||^2`: the Fisher information is the Hessian of the KL divergence at no error.

    `trace F = E ||grad log p(y)||^2` per token, with y drawn from the model's own predictions. The gradients of different
    tokens are then uncorrelated, so the squared norm of their sum over a sequence is the sum of the tokens' traces: one
    backward pass per sequence.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    trace = dict.fromkeys((name for unit in units for name in unit.layers), 0.0)
    hooks = []
    for name in trace:

        def add(parameter: nn.Parameter, name: str = name) -> None:
            trace[name] += float(parameter.grad.float().square().sum(dtype=torch.float64))
            parameter.grad = None  # of one layer at a time, so that memory holds no second model

        weight = model.get_submodule(name).weight
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(add))
    try:
        for ids in log.progress(tokens, "Fisher information", "sequence"):
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
    alpha = [sum(trace[name] for name in unit.layers) / tokens.numel() / unit.weights / 2 for unit in units]
    return [{b: a * error for b, error in unit.error.items()} for a, unit in zip(alpha, units, strict=True)]


@torch.no_grad()
def kl(
    model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: Scheme, log: RunLog, rounding: Rounding
) -> list[Distortion]:
    """The KL divergence from full precision, measured, when one unit alone is rounded to so many bits.

    `rounding` is to be one that makes up for its errors, as GPTQ does: what plain rounding breaks most (the inputs of a few
    large activations) better methods repair, and bits spent there would be lost on them.
    """
    hessians = _input_hessians(model, units, tokens)
    ids = tokens[:SEQUENCES].to(model.device)
    prefix, blocks = decoder_blocks(model)
    outputs: list = []
    hooks = [block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)) for block in blocks]
    exact = _log_probabilities(model, ids)
    for hook in hooks:
        hook.remove()
    found = []
    for unit in log.progress(units, "KL of one unit", "unit"):
        first = int(unit.layers[0].removeprefix(f"{prefix}.").partition(".")[0])
        layers = [model.get_submodule(name) for name in unit.layers]
        weights = [layer.weight.detach() for layer in layers]
        measured = {}
        with _known(blocks[:first], outputs):
            for bits in (b for b in unit.error if b <= max(MEASURABLE, min(unit.error))):
                grid = Scheme("", scheme.weights, allocation={unit.layers[0]: bits}).grid(
                    unit.layers[0], layers[0].in_features
                )
                rounded = rounding(torch.cat(weights).float(), hessians[unit.layers[0]], grid)
                for layer, part in zip(layers, rounded.split([len(w) for w in weights]), strict=True):
                    layer.weight.data = part.to(layer.weight.dtype)
                divergence = F.kl_div(_log_probabilities(model, ids), exact, log_target=True, reduction="sum")
                measured[bits] = max(0.0, float(divergence)) / ids.numel()
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight
        most = max(measured)
        found.append({b: measured.get(b, measured[most] * error / unit.error[most]) for b, error in unit.error.items()})
    return found


def uniform(model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: Scheme, log: RunLog) -> list[Distortion]:
    """The squared rounding error itself, as if an error cost the same everywhere."""
    return [unit.error for unit in units]


def _input_hessians(model: nn.Module, units: Sequence[Unit], tokens: Tensor) -> dict[str, Tensor]:
    """Of each unit, by its first layer: the Hessian (in, in) of what it receives."""
    found = {unit.layers[0]: Hessian(model.get_submodule(unit.layers[0]).in_features, model.device) for unit in units}
    with ExitStack() as stack:
        for name, hessian in found.items():
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args, h=hessian: h.add(args[0]))
            stack.callback(hook.remove)
        for ids in tokens:
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    return {name: hessian.value() for name, hessian in found.items()}


@contextmanager
def _known(blocks: Sequence[nn.Module], outputs: Sequence) -> Iterator[None]:
    """Let these blocks return what they returned before: nothing in them has changed."""
    for block, output in zip(blocks, outputs, strict=False):
        block.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """(samples, sequence, vocabulary), fp32."""
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

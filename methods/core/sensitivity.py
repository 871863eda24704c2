"""What an error in a layer's weights costs the model's predictions: the distortions that bit allocation weighs.

Each estimator takes the model, its units (layers that share an input), token ids (samples, sequence), the scheme's weights
and a log, and returns for each unit its distortion by bits; that of `fisher` and `kl` is the KL divergence from full
precision, nats per token. Errors are those of the weights alone: activations and KV cache are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.formats import Format
from methods.core.job.log import RunLog
from methods.core.model.anatomy import decoder_blocks, hooked
from methods.core.model.blocks import block_function, block_inputs
from methods.core.model.hessian import Hessian
from methods.core.scales import ScaleSearch, rounded_to_nearest
from methods.core.scheme import WeightScheme

Distortion = dict[int, float]
Rounding = Callable[[Tensor, Tensor, Format], Tensor]  # weight (out, in), its inputs' Hessian, format -> rounded weight
ROWS = 128  # rows of a layer, drawn at random; their rounding error stands for that of all, at a tenth of the time
HELD_OUT = 4  # sequences on which `kl` measures; it rounds by the inputs in the others
MEASURABLE = 4  # bits; the divergence of one unit with more drowns in the rounding of the arithmetic


@dataclass(frozen=True)
class Unit:
    """Layers that get the same bits, because they share an input. By bits: what they take in a checkpoint, and for each
    layer the summed squared error of its weights when rounded, estimated from ROWS of them."""

    layers: tuple[str, ...]
    weights: int
    stored: dict[int, int]
    errors: dict[int, tuple[float, ...]]

    @property
    def error(self) -> dict[int, float]:
        return {bits: sum(errors) for bits, errors in self.errors.items()}


def units_of(linears: dict[str, nn.Linear], stages: list[list[str]], scheme: WeightScheme, log: RunLog) -> list[Unit]:
    """The units of a model's layers, each rounded to every width of the scheme."""
    units = []
    for stage in log.progress(stages, "rounding to each width", "unit"):
        shapes = [tuple(linears[name].weight.shape) for name in stage]
        stored = {
            bits: sum(scheme.number_format(bits, columns).stored_bits(rows, columns) for rows, columns in shapes)
            for bits in scheme.widths
        }
        errors = {bits: tuple(rounding_error(linears[name], scheme, bits) for name in stage) for bits in scheme.widths}
        units.append(Unit(tuple(stage), sum(a * b for a, b in shapes), stored, errors))
    return units


def rounding_error(linear: nn.Linear, scheme: WeightScheme, bits: int) -> float:
    """Summed squared error of a layer's weights when they are rounded to `bits` with the best scales, from ROWS rows."""
    rows = torch.randperm(linear.out_features, generator=torch.Generator().manual_seed(0))[:ROWS]
    weight = linear.weight.detach()[rows.to(linear.weight.device)].float()
    form = scheme.number_format(bits, linear.in_features)
    rounded = rounded_to_nearest(weight, form, ScaleSearch("search", norm=2.0)).value(torch.float32)
    return float((rounded - weight).square().mean(dtype=torch.float64)) * linear.weight.numel()


def fisher(
    model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: WeightScheme, log: RunLog
) -> list[Distortion]:
    """Sum over a unit's layers of `1/2 trace(F_l) / n_l * ||W_l - W_l,q||^2`.

    The Fisher information F is the Hessian of the KL divergence at no error. The model must be in a dtype whose gradients do
    not underflow.

    `trace F = E ||grad log p(y)||^2` per token, with y drawn from the model's own predictions. The gradients of different
    tokens are then uncorrelated, so the squared norm of their sum over a sequence is the sum of the tokens' traces: one
    backward pass per sequence.
    """
    model.requires_grad_(False)
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
        with hooked(hooks):
            for ids in log.progress(tokens, "Fisher information", "sequence"):
                logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        model.requires_grad_(False)
    _require_reached({name: t > 0 for name, t in trace.items()})
    alpha = {name: t / tokens.numel() / model.get_submodule(name).weight.numel() / 2 for name, t in trace.items()}
    return [
        {
            b: sum(alpha[name] * e for name, e in zip(unit.layers, errors, strict=True))
            for b, errors in unit.errors.items()
        }
        for unit in units
    ]


@torch.no_grad()
def kl(
    model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: WeightScheme, log: RunLog, rounding: Rounding
) -> list[Distortion]:
    """The KL divergence from full precision, measured when one unit alone is rounded to a number of bits.

    It is measured on the first HELD_OUT sequences, up to MEASURABLE bits; for more bits it is taken to fall as the squared
    rounding error does. `rounding` must compensate its errors, as GPTQ does, by the inputs in the other sequences. Plain
    rounding does most damage at the inputs of a few large activations. Better methods repair that, so bits spent there would
    be lost on them. ValueError if no sequence is left to round by, or if rounding breaks the model.

    All that lies behind a unit is computed anew for each of its widths: the cost grows with the square of the depth. Of the
    Hessians, a block's are in memory at a time.
    """
    if len(tokens) <= HELD_OUT:
        raise ValueError(f"kl measures on {HELD_OUT} sequences and rounds by others; {len(tokens)} are too few")
    hessians = _input_hessians(model, units, tokens[HELD_OUT:])  # made as they are asked for
    ids = tokens[:HELD_OUT].to(model.device)
    prefix, blocks = decoder_blocks(model)
    outputs: list = []
    hooks = [block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)) for block in blocks]
    with hooked(hooks):
        exact = _log_probabilities(model, ids)
    distortions = []
    for unit, hessian in zip(log.progress(units, "KL of one unit", "unit"), hessians, strict=True):
        first = int(unit.layers[0].removeprefix(f"{prefix}.").partition(".")[0])
        layers = [model.get_submodule(name) for name in unit.layers]
        weights = [layer.weight.detach() for layer in layers]
        measured = {}
        with _replayed(blocks[:first], outputs):
            for bits in (b for b in unit.error if b <= max(MEASURABLE, min(unit.error))):
                form = scheme.number_format(bits, layers[0].in_features)
                rounded = rounding(torch.cat(weights).float(), hessian, form)
                for layer, part in zip(layers, rounded.split([len(w) for w in weights]), strict=True):
                    layer.weight.data = part.to(layer.weight.dtype)
                divergence = float(F.kl_div(_log_probabilities(model, ids), exact, log_target=True, reduction="sum"))
                if not math.isfinite(divergence):
                    raise ValueError(f"{', '.join(unit.layers)} at {bits} bits: the divergence is {divergence}")
                measured[bits] = max(0.0, divergence) / ids.numel()
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight
        widest = max(measured)
        # What rounds exactly, as zeros do, costs nothing.
        of_error = measured[widest] / unit.error[widest] if unit.error[widest] else 0.0
        distortions.append({b: measured.get(b, of_error * error) for b, error in unit.error.items()})
    return distortions


def uniform(
    model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: WeightScheme, log: RunLog
) -> list[Distortion]:
    """The squared rounding error itself, as if an error cost the same in every layer."""
    return [unit.error for unit in units]


@torch.no_grad()
def _input_hessians(model: nn.Module, units: Sequence[Unit], tokens: Tensor) -> Iterator[Tensor]:
    """The Hessian (in, in) of each unit's inputs, in the order of the units, which is that of the blocks."""
    prefix, blocks = decoder_blocks(model)
    hidden, arguments = block_inputs(model, blocks, tokens.to(model.device), batch_size=1)
    for index, block in enumerate(blocks):
        inside = [unit.layers[0] for unit in units if unit.layers[0].startswith(f"{prefix}.{index}.")]
        hessians = {name: Hessian(model.get_submodule(name).in_features, model.device) for name in inside}
        with hooked(_adding(model, hessians)):
            forwards = [block_function(block, given, model.device) for given in arguments[index]]
            hidden = [forward(x) for forward, x in zip(forwards, hidden, strict=True)]
        _require_reached({name: hessian.rows > 0 for name, hessian in hessians.items()})
        for name in inside:
            yield hessians.pop(name).value()


def _adding(model: nn.Module, hessians: dict[str, Hessian]) -> list:
    """Hooks that add the inputs of layers to their Hessians."""
    return [
        model.get_submodule(name).register_forward_pre_hook(lambda _module, args, h=hessian: h.add(args[0]))
        for name, hessian in hessians.items()
    ]


def _require_reached(reached: dict[str, bool]) -> None:
    """ValueError for experts that no token reaches: their errors would cost nothing."""
    if unreached := [name for name, is_reached in reached.items() if not is_reached]:
        raise ValueError(f"no token reaches {', '.join(unreached)}: allocate on more samples")


@contextmanager
def _replayed(blocks: Sequence[nn.Module], outputs: Sequence) -> Iterator[None]:
    """Let these blocks return what they returned before, since nothing in them has changed."""
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

"""Linear layers whose weight is a function of trained parameters: what QAT methods put in place, train and fold.

A method gives the function as a module (parametrizations.py). This file puts it into the model, computes the weight again in
the backward pass, quantizes the layer's tokens with a straight-through gradient, and folds it into codes afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.formats import Format
from methods.core.job import ranks
from methods.core.job.log import RunLog
from methods.core.job.runtime import device, release_freed_memory
from methods.core.model.activations import copy_marks, fake_quantize_tokens
from methods.core.model.anatomy import block_linears, decoder_blocks, linears_in, replace_module
from methods.core.model.experts import is_expert
from methods.core.model.layers import QuantizedLinear, are_large, weights_of
from methods.core.scheme import Scheme
from methods.core.training import sharding
from methods.core.training.loop import Schedule, subsample, train
from methods.core.training.losses import Loss
from methods.core.training.parametrizations import Parametrization, straight_through

MOVED_FAR = 0.5  # relative change of a scale that a short training should not make


def train_weights(
    model: nn.Module,
    make: Callable[[str, nn.Module], nn.Module],
    rates: Callable[[nn.Module], Iterable[tuple[Iterable[nn.Parameter], float]]],
    tokens: Tensor,
    loss: Loss,
    schedule: Schedule,
    log: RunLog,
) -> nn.Module:
    """Train every linear layer of the decoder blocks as another module, and put what it folds to in its place.

    make: of a layer's name and the layer, the module to train, which has `folded(name, log)`. rates: of that module (of its
    parametrization, where it has one), parameters with their learning rates. tokens, loss, schedule, log: as for `train`.
    """
    rated: list[tuple[nn.Module, str, float]] = []  # a layer, the name of a parameter of it, the rate

    def make_rated(name: str, linear: nn.Module) -> nn.Module:
        layer = make(name, linear)
        names = {id(parameter): name for name, parameter in layer.named_parameters()}
        for parameters, rate in rates(getattr(layer, "parametrization", layer)):
            rated.extend((layer, names[id(parameter)], rate) for parameter in parameters)
        return layer

    shell = sharding.shell(model) if ranks.count() > 1 else None
    large = are_large(block_linears(model).values())
    layers = insert(model, make_rated)
    groups: dict[float, list[nn.Parameter]] = {}
    for layer, name, rate in rated:  # by name, since dividing a model makes other parameters of its own
        groups.setdefault(rate, []).append(layer.get_parameter(name))
    train(
        model, [{"params": parameters, "lr": rate} for rate, parameters in groups.items()], tokens, loss, schedule, log
    )
    if not sharding.is_divided(model):
        fold(model, layers, log, large)
        return model
    for block in sharding.whole_blocks(model):
        fold(shell, {name: layer for name, layer in layers.items() if name.startswith(f"{block}.")}, log, large)
        # A copy, since what a layer hands on as it is (a bias) is taken from it when the next block is whole.
        replace_module(shell, block, copy.deepcopy(shell.get_submodule(block)).cpu())
    return shell


def insert(model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> dict[str, nn.Module]:
    """Put `make(name, linear)` in the place of every linear layer of the decoder blocks; these modules by name.

    Layer by layer on the device, the rest of the model afterwards: so the full-precision weights are never all there. If
    several processes train all weights, or few values of a large model, it is divided among them block by block; else each
    holds all of it.
    """
    prefix, blocks = decoder_blocks(model)
    several = ranks.count() > 1
    divides, layers = several and are_large(block_linears(model).values()), {}
    model.requires_grad_(False)
    for number, block in enumerate(blocks):
        names = [f"{prefix}.{number}.{name}" for name in linears_in(block)]
        weights = weights_of(map(model.get_submodule, names))
        made = put(model, names, make)
        layers |= made
        if number == 0:
            divides |= several and sum(p.numel() for layer in made.values() for p in trained(layer)) >= weights
        if divides:
            sharding.divide(block)
    if divides:
        sharding.divide(model)
    else:
        model.to(device())
    release_freed_memory()  # the weights that they replace: a training needs blocks of other sizes
    return layers


def put(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], nn.Module]) -> dict[str, nn.Module]:
    """`insert` for the layers of these names only, which are moved to the device one by one."""
    layers = {}
    for name in names:
        layers[name] = make(name, model.get_submodule(name).to(device()))
        replace_module(model, name, layers[name])
    return layers


def fold(model: nn.Module, layers: dict[str, nn.Module], log: RunLog, large: bool = False) -> None:
    """Put what each trained layer folds to in its place, in their model or in one of its shape; packed, of a large model."""
    with torch.no_grad():
        for name, layer in layers.items():
            folded = layer.folded(name, log)
            if large and isinstance(folded, QuantizedLinear):
                folded.pack()
            replace_module(model, name, folded)


def quantized_by(
    scheme: Scheme, parametrize: Callable[[nn.Module, Format], Parametrization]
) -> Callable[[str, nn.Module], TrainedLinear]:
    """A `make` of `train_weights`: `parametrize(linear, format)`, in the format that the scheme gives the layer."""

    def make(name: str, linear: nn.Module) -> TrainedLinear:
        return TrainedLinear(linear, parametrize(linear, scheme.number_format(name, linear.in_features)))

    return make


class TrainedLinear(nn.Module):
    """A linear layer with a parametrized weight, which is computed again in the backward pass: between the two passes no
    (out, in) intermediate of it is kept. LR-QAT's paper calls this gradient checkpointing."""

    def __init__(self, linear: nn.Linear, parametrization: Parametrization):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parametrization = parametrization
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        copy_marks(linear, self)
        with torch.no_grad():
            first = parametrization.rounded()
            self.first_scale, self.first_codes = sharding.frozen(first.scale), subsample(first.codes)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_tokens is not None:
            x = straight_through(x, lambda v: fake_quantize_tokens(v, self.input_tokens))
        y = _RecomputedLinear.apply(x, self.bias, self.parametrization, *trained(self.parametrization))
        if self.output_tokens is not None:
            y = straight_through(y, lambda v: fake_quantize_tokens(v, self.output_tokens))
        return y

    def folded(self, name: str, log: RunLog) -> QuantizedLinear:
        """The codes of the trained weight: nothing of the training is left.

        Logs the share of codes that are not those of step 0, `codes_changed`; it is what training did to the rounding, while
        every trained parameter moves a little. Departures tell how many scales moved by more than half, and of an expert that
        ends as it started, since no token reached it.
        """
        rounded = self.parametrization.rounded()
        changed = (subsample(rounded.codes) != self.first_codes).float().mean().item()
        log.layer(name, codes_changed=changed)
        ratio = rounded.scale.float() / self.first_scale.float()
        if is_expert(name) and not changed and (ratio == 1).all():
            log.departure(
                f"{name}: as it was rounded at the start; the training changed no scale, and no code of a sample"
            )
        if far := int(((ratio - 1).abs() > MOVED_FAR).sum()):
            lost = int((ratio <= 0).sum())
            log.departure(
                f"{name}: training moved {far} of {ratio.numel()} scales by more than half"
                + (f", {lost} of them to zero or through it" if lost else "")
            )
        layer = QuantizedLinear(rounded, self.bias, self.dtype)
        copy_marks(self, layer)
        return layer


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that receive gradients."""
    return [p for p in module.parameters() if p.requires_grad]


class _RecomputedLinear(torch.autograd.Function):
    """`x W^T + b`. Unlike torch.utils.checkpoint around the layer it recomputes W only, not the product."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, parametrization: Parametrization, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parametrization, ctx.parameters = parametrization, parameters
        return F.linear(x, parametrization().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            weight = ctx.parametrization()
        weight_gradient = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        parts = torch.autograd.grad(weight, ctx.parameters, weight_gradient.to(weight.dtype))
        return gradient @ weight.detach().to(x.dtype), None, None, *parts

"""How much a model's predictions suffer from an error in a layer's weights: the alpha_l of bit allocation.

An error d in the weights of unit l (layers that share an input) changes the model's predictions by about

    KL = alpha_l * ||d||^2        nats per token

so that `alpha_l` times the squared rounding error of `methods.core.allocation` is a distortion in nats. Each estimator takes
the model, its units, token ids (samples, sequence), and a log, and returns alpha of each unit. `ESTIMATORS` are a scheme's
choices of `sensitivity`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.allocation import Unit
from methods.core.grid import ScaleSearch, choose_scale
from methods.core.linear import QuantizedLinear
from methods.core.log import RunLog
from methods.core.modules import replace_module
from methods.core.scheme import Scheme


def fisher(model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: Scheme, log: RunLog) -> list[float]:
    """Half the mean eigenvalue of the Fisher information, which is the Hessian of the KL divergence at no error.

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
    return [sum(trace[name] for name in unit.layers) / tokens.numel() / unit.weights / 2 for unit in units]


@torch.no_grad()
def measured_kl(model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: Scheme, log: RunLog) -> list[float]:
    """The KL divergence from full precision when one unit alone is rounded, over its squared rounding error.

    Rounded to the width that is nearest to the scheme's average: smaller errors drown in those of the arithmetic, and to
    larger ones the predictions do not respond in proportion.
    """
    w = scheme.weights
    bits = min(w.widths, key=lambda b: (abs(b - w.average_bits), b))
    exact = [_log_probabilities(model, ids) for ids in tokens]
    found = []
    for unit in log.progress(units, f"KL of one unit at {bits} bits", "unit"):
        originals = {name: model.get_submodule(name) for name in unit.layers}
        for name, linear in originals.items():
            grid = Scheme("", w, allocation={name: bits}).grid(name, linear.in_features)
            scale, zero_point = choose_scale(linear.weight, grid, ScaleSearch("search", norm=2.0))
            replace_module(model, name, QuantizedLinear.rounding(linear, scale, zero_point, grid))
        kl = [
            F.kl_div(_log_probabilities(model, ids), p, log_target=True, reduction="sum")
            for ids, p in zip(tokens, exact, strict=True)
        ]
        for name, linear in originals.items():
            replace_module(model, name, linear)
        found.append(max(0.0, float(sum(kl))) / tokens.numel() / unit.error[bits])
    return found


def uniform(model: nn.Module, units: Sequence[Unit], tokens: Tensor, scheme: Scheme, log: RunLog) -> list[float]:
    """The same for all: bits by the layers' weights alone."""
    return [1.0] * len(units)


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """(sequence, vocabulary) of one sequence, fp32."""
    return model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float().log_softmax(-1)


ESTIMATORS = {"fisher": fisher, "kl": measured_kl, "uniform": uniform}

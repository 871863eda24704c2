"""Experts of a mixture as linear layers, so that every method treats them as it treats others.

transformers holds the experts of a block in two tensors, gate_up_proj (experts, 2 inner, hidden) and down_proj (experts,
hidden, inner). Here each expert is three layers, N.gate_proj, N.up_proj, N.down_proj, as in the files of Qwen3-MoE, OLMoE and
DeepSeek. The router stays as it is, in full precision.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # and what Mixtral's files call them
LAYER = re.compile(rf"(.+)\.(\d+)\.({'|'.join(PARTS)})")


class Expert(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of a block, called as transformers' own are: with tokens (n, hidden), and for each token the experts that
    it goes to and their shares, both (n, k)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            # Without tokens it is called all the same: a walk waits for every layer in every batch.
            y = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total


def separate(model: nn.Module) -> nn.Module:
    """The model with its fused experts as linear layers, whose weights are views of the fused ones. What is fused in another
    way (with biases, interleaved or transposed, as in gpt-oss) stays."""
    for name, module in list(model.named_modules()):
        if _is_known(module):
            halves = (weight.chunk(2) for weight in module.gate_up_proj)
            experts = Experts(
                Expert(gate, up, down, module.act_fn) for (gate, up), down in zip(halves, module.down_proj, strict=True)
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, experts)
    return model


def _is_known(module: nn.Module) -> bool:
    """Whether it says of itself that it is fused as `separate` takes it apart."""
    said = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    said |= {"has_post_expert_norm": False}
    return all(getattr(module, key, None) is value for key, value in said.items()) and (
        type(module)._apply_gate.__name__ == "_default_apply_gate"  # not limited or shifted
    )


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def fused(model: nn.Module) -> dict[str, Tensor]:
    """The weights of experts that are not quantized as transformers has them, by name."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts) and isinstance(module[0].gate_proj, nn.Linear):
            pairs = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in module]
            state[f"{name}.gate_up_proj"] = torch.stack(pairs)
            state[f"{name}.down_proj"] = torch.stack([expert.down_proj.weight for expert in module])
    return state


def fused_shapes(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int, int]]:
    """Shapes of the fused tensors that hold the layers of these names and shapes (out, in); of other layers, nothing."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, (rows, columns) in shapes.items():
        if match := LAYER.fullmatch(name):
            prefix, number, part = match.groups()
            key = _fused_name(prefix, part)
            count = max(int(number) + 1, found.get(key, (0,))[0])
            found[key] = (count, rows if part == "down_proj" else 2 * rows, columns)
    return found


def _fused_name(prefix: str, part: str) -> str:
    return f"{prefix}.down_proj" if part == "down_proj" else f"{prefix}.gate_up_proj"


def is_expert(name: str) -> bool:
    """Whether a layer of this name is of an expert, which gets only the tokens that a router sends to it."""
    return LAYER.fullmatch(name) is not None


def stored_under(name: str) -> tuple[str, str]:
    """Other keys than its own under which files may have the weight of an expert's layer: fused, and as Mixtral's."""
    prefix, number, part = LAYER.fullmatch(name).groups()
    return _fused_name(prefix, part), f"{prefix.replace('.mlp.', '.block_sparse_moe.')}.{number}.{PARTS[part]}.weight"


def of_fused(name: str, weight) -> Tensor:
    """The weight of an expert's layer in what can be indexed as the fused tensor."""
    _, number, part = LAYER.fullmatch(name).groups()
    own = weight[int(number)]
    return own if part == "down_proj" else own.chunk(2)[part == "up_proj"]

"""Finding one's way in a transformers causal language model: its decoder blocks and their linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from methods.core.model.experts import Experts, is_expert


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Qualified name and list of the text model's decoder blocks. ValueError if there is no list of `num_hidden_layers`."""
    count = model.config.get_text_config().num_hidden_layers
    text = set(model.get_decoder().modules())  # not a vision tower, which may have as many
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in text:
            return name, module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder blocks")


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` inside the decoder blocks by qualified name, but routers of experts: the layer list that all methods
    quantize.

    In a model that is quantized already (`init_from`) they are QuantizedLinear. ValueError if there is none (GPT-2 has
    another kind of layer, for example).
    """
    prefix, blocks = decoder_blocks(model)
    linears = {f"{prefix}.{name}": m for name, m in linears_in(blocks).items()}
    if not linears:
        raise ValueError(f"the decoder blocks of {type(model).__name__} have no nn.Linear layers to quantize")
    return linears


def linears_in(part: nn.Module) -> dict[str, nn.Linear]:
    """Those of a part of the decoder blocks, by name in it."""
    routers = _routers(part)
    return {name: m for name, m in part.named_modules() if _is_linear(m) and name not in routers}


def _is_linear(module: nn.Module) -> bool:
    # A subclass that computes something else (a router that returns three tensors) is none.
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or hasattr(module, "packed")


def _routers(part: nn.Module) -> set[str]:
    """Layers beside experts that give a number for each expert, or one, the share of an expert that all tokens go to."""
    routers: set[str] = set()
    for name, experts in part.named_modules():
        if isinstance(experts, Experts):
            beside, rows = name.rpartition(".")[0], (1, len(experts))
            layers = part.get_submodule(beside).named_modules(prefix=beside)
            linears = ((inner, m) for inner, m in layers if isinstance(m, nn.Linear) and not is_expert(inner))
            routers |= {inner for inner, m in linears if m.out_features in rows}
    return routers


def head_width(model: nn.Module) -> int:
    """Width of an attention head of the text model."""
    text = model.config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there until the end of the `with` block."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unquantizable_parameters(model: nn.Module) -> list[str]:
    """Matrices in the decoder blocks which no layer of `block_linears` owns (routers, for example): they stay as they are."""
    prefix, blocks = decoder_blocks(model)
    owned = {f"{name}.weight" for name in linears_in(blocks)}
    return [f"{prefix}.{n}" for n, p in blocks.named_parameters() if p.dim() >= 2 and n not in owned]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def checkpoint_blocks(model: nn.Module) -> None:
    """Let each decoder block keep its input only and be computed again in the backward pass (gradient checkpointing)."""
    for block in decoder_blocks(model)[1]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)

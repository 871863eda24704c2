"""Rotate: another basis for the residual stream and for each head's values, the same function (QuaRot, arXiv 2404.00456).

With an orthogonal Q the residual stream x becomes x Q. Layers that read it (q, k, v, gate, up, the head) become W Q, layers
that write to it (o, down) and the embedding become Q^T W, and an RMSNorm without gain commutes with Q. A second rotation of
each head's values undoes itself between v and o. Both are fused into the weights, and nothing is computed when the model
runs. Weights and activations have fewer outliers in the new basis, so that less is lost by rounding them.

Before that, the norms' gains are folded into the layers that read them, and a head that is the embedding becomes a matrix of
its own. Q is `diag(random signs) H / sqrt(n)` for a Hadamard matrix H (methods/core/model/hadamard.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.registry import Method
from methods.core.model.anatomy import block_linears, decoder_blocks, head_width, unquantizable_parameters
from methods.core.model.feeders import norm_gain, read_norms, set_norm_gain
from methods.core.model.function import same_function
from methods.core.model.hadamard import random_orthogonal
from methods.core.scheme import Scheme

METHOD = Method("transform")
PIECE = 2**24  # numbers that are worked on at a time, in fp64, in up to three copies


@dataclass(frozen=True)
class Config:
    pass


@torch.no_grad()
def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    if fused := unquantizable_parameters(model):
        raise ValueError(f"rotate knows linear layers only, and {fused[0]} is none")
    with same_function(model, log):
        readers = read_norms(model)
        untie_head(model)
        for norm, layers in readers.items():
            fold_gain(model.get_submodule(norm), [model.get_submodule(name) for name in layers], norm)

        generator = torch.Generator().manual_seed(torch.initial_seed())
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        stream, made_of = random_orthogonal(embedding.weight.shape[1], generator)
        log.info(f"residual stream: {made_of}")
        reading = {name for layers in readers.values() for name in layers}
        for name, linear in block_linears(model).items():
            if name in reading:
                rotate_inputs(linear, stream)
            elif linear.out_features == len(stream):
                rotate_outputs(linear, stream)
        rotate_inputs(embedding, stream)
        rotate_inputs(head, stream)
        rotate_values(model, generator, log)
    return model


def untie_head(model: nn.Module) -> None:
    """Give the head a matrix of its own if it has been the embedding."""
    text = model.config.get_text_config()
    if text.tie_word_embeddings:
        model.config.tie_word_embeddings = text.tie_word_embeddings = False
        model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())


def fold_gain(norm: nn.Module, layers: list[nn.Linear], name: str) -> None:
    """Multiply a norm's gain into the layers that read it. ValueError if it is not an RMSNorm."""
    gain = norm_gain(norm, name)
    for linear in layers:
        linear.weight.data *= gain
    set_norm_gain(norm, torch.ones_like(gain), name)


def rotate_values(model: nn.Module, generator: torch.Generator, log: RunLog) -> None:
    """Give the values of every head another basis, between v_proj and o_proj. Models without this pair keep theirs."""
    rotation, made_of = random_orthogonal(head_width(model), generator)
    pairs = 0
    for _, block in decoder_blocks(model)[1].named_children():
        layers = {name.rpartition(".")[2]: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        if "v_proj" in layers and "o_proj" in layers:
            rotate_outputs(layers["v_proj"], rotation)
            rotate_inputs(layers["o_proj"], rotation)
            pairs += 1
    log.info(f"values of each head: {made_of}, in {pairs} blocks")


def rotate_inputs(layer: nn.Linear | nn.Embedding, rotation: Tensor) -> None:
    """`W <- W (I x R)`: the layer receives each part of its input, as wide as R, in the new basis."""
    _rotate(layer.weight.data, rotation)


def rotate_outputs(linear: nn.Linear, rotation: Tensor) -> None:
    """`W <- (I x R)^T W`: the layer returns each part of its output, as wide as R, in the new basis."""
    _rotate(linear.weight.data.T, rotation)
    if linear.bias is not None:
        _rotate(linear.bias.data[None], rotation)


def _rotate(rows: Tensor, rotation: Tensor) -> None:
    """Each part of a row, as wide as the rotation, times that. In place, some rows at a time: copies of all matrices would be
    a second model. (Maps of files are private: the files stay.) Computed in fp64: the products are rounded once."""
    for piece in rows.unflatten(1, (-1, len(rotation))).split(max(1, PIECE // rows.shape[1])):
        piece.copy_(piece.double() @ rotation)

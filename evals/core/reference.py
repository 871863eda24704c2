"""What a full-precision model predicts at each token of some windows: computed once per model and text, and kept in a file.

The file has the inputs of the model's head, which give its logits again exactly and are a hundredth of their size. (The 256
most likely tokens, and the rest as one, would be smaller still, but 6 to 8 % off on SmolLM2-135M; reports/LOG.md.)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.core.job.tensors import read_sealed, write_sealed
from methods.core.model.anatomy import hooked


@torch.inference_mode()
def reference(model, windows: Tensor, log) -> dict[str, Tensor]:
    """Tensors that give the full-precision model's logits at each token of windows (windows, length) int64.

    `states` (windows, length, width), the head's input; `head` (vocabulary, width), its weight; `bias` if it has one.
    ValueError if the logits are not the head's output alone, as in models that cap or scale them.
    """
    head = model.get_output_embeddings()
    states_of_windows = []
    for ids in log.progress(windows, "reference", "window"):
        states, logits = _head_input(model, head, ids.to(model.device))
        if not states_of_windows and not torch.equal(F.linear(states, head.weight, head.bias), logits):
            raise ValueError(
                f"{type(model).__name__} changes the logits after its head; divergence keeps what the head reads"
            )
        states_of_windows.append(states.cpu())
        del logits  # 50 MB a window of 512 tokens and 49,152 words: not beside those of the next
    tensors = {"states": torch.stack(states_of_windows), "head": head.weight.detach().cpu()}
    return tensors if head.bias is None else tensors | {"bias": head.bias.detach().cpu()}


def _head_input(model, head, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The states (tokens, width) that `head` is given for one window (tokens,), and the model's logits."""
    states = []
    with hooked([head.register_forward_pre_hook(lambda module, args: states.append(args[0][0]))]):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return states[0], logits


def write_reference(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Write a reference, its windows (`input_ids`) among its tensors, and what is known about them."""
    write_sealed(path, tensors, {"info": json.dumps(info)})


def read_reference(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the facts that `write_reference` wrote. ValueError for a damaged file."""
    tensors, facts = read_sealed(path)
    return tensors, json.loads(facts["info"])

"""Whether a model is still the function that it was: the promise of a transform."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog

TOLERANCE = 1e-4  # relative change of the logits that the arithmetic may make, in fp32


def probe(model: nn.Module) -> Tensor:
    """Some token ids (2, 32), always the same."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))


@contextmanager
def same_function(model: nn.Module, log: RunLog) -> Iterator[None]:
    """ValueError at the end of the `with` block if the model, in fp32, has become another function in it."""
    ids = probe(model)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    yield
    with torch.no_grad():
        change = float((model(input_ids=ids, use_cache=False).logits - before).norm() / before.norm())
    log.info(f"the logits have changed by {change:.1e} of their norm")
    if not change < TOLERANCE:
        raise ValueError(
            f"{type(model).__name__} is another function after the transform: its logits change by {change:.2g} of their "
            "norm. Something else reads or writes what was transformed than the layers that were found"
        )

"""Losses of training: next token, and distillation from the full-precision model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from methods.core.job.runtime import rows_at_a_time

Loss = Callable[[nn.Module, Tensor], Tensor]  # of the model and token ids (batch, sequence), a scalar in nats


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats, fp32, of each token of a batch (batch, sequence) but the first, given those before it."""
    logits = model(input_ids=batch, use_cache=False).logits
    return _CrossEntropy.apply(logits[:, :-1], batch[:, 1:])


def distillation_loss(teacher: nn.Module) -> Loss:
    """Cross-entropy of the student against the teacher's distribution at every token, temperature 1 (LLM-QAT, eq. 4)."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher(input_ids=batch, use_cache=False).logits
        return _CrossEntropy.apply(model(input_ids=batch, use_cache=False).logits, targets)

    return loss


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits (..., vocabulary) against token ids (...) or against logits of the same shape.

    The softmaxes over a vocabulary are a step's largest tensors and, done one operation after another in fp32, took a third
    of a distillation step on a CPU. Here loss and gradient are computed together, some positions at a time while they are
    in the cache, and only the gradient is kept.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        soft = targets.dim() == logits.dim()
        gradient = torch.empty_like(logits)
        count, total = logits[..., 0].numel(), logits.new_zeros((), dtype=torch.float32)
        rows = rows_at_a_time(logits)
        for sequence, target, out in zip(logits, targets, gradient, strict=True):
            for x, t, g in zip(sequence.split(rows), target.split(rows), out.split(rows), strict=True):
                x = x.float()
                logsumexp = x.logsumexp(-1, keepdim=True)
                p = (x - logsumexp).exp_()
                if soft:
                    t = t.float().softmax(-1)
                    total += logsumexp.sum() - torch.dot(t.flatten(), x.flatten())
                    p -= t
                else:
                    t = t.unsqueeze(-1)
                    total += (logsumexp - x.gather(-1, t)).sum()
                    p.scatter_add_(-1, t, p.new_full(t.shape, -1.0))
                g.copy_(p.mul_(1 / count))
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream), None  # in place: the graph is walked once

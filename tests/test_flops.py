"""Floating-point operations of a training against the formulas of its docstring."""

import pytest
import torch

from methods import block_ap, fine_tune, full_qat
from methods.core.job.log import RunLog
from methods.core.model.anatomy import block_linears
from methods.core.model.checkpoint import load_model
from methods.core.scheme import Scheme

STEPS, BATCH, LENGTH = 2, 4, 32
TOKENS = STEPS * BATCH * LENGTH
SCHEME = Scheme.from_dict("w4", {"weights": {"bits": 4, "group_size": 64}})


def text():
    return torch.randint(256, (STEPS, 1, BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def attention(model, forward=2, backward=5):
    """Products of queries with keys and of scores with values, (length x length x width) each; backward, five of them."""
    config = model.config
    products = STEPS * BATCH * LENGTH**2 * config.hidden_size * config.num_hidden_layers
    return 2 * products * (forward + backward)


def weights(model):
    return sum(linear.weight.numel() for linear in block_linears(model).values()), model.lm_head.weight.numel()


@pytest.mark.parametrize("loss", ["next_token", "distillation"])
def test_full_training_takes_six_operations_a_weight_and_token(tiny, tmp_path, loss):
    model, log = load_model(tiny, torch.bfloat16), RunLog(tmp_path)
    blocks, head = weights(model)
    expected = (6 * blocks + 4 * head) * TOKENS + attention(model)  # the head is not trained
    teacher = {}
    if loss == "distillation":
        teacher = {"teacher": lambda: load_model(tiny, torch.bfloat16)}
        expected += 2 * (blocks + head) * TOKENS + attention(model, backward=0)
    full_qat.apply(model, SCHEME, full_qat.Config(loss=loss), text(), log, **teacher)
    assert log.training["flops"] == pytest.approx(expected, rel=0.01)


def test_low_rank_training_needs_no_gradient_of_the_weights(tiny, tmp_path):
    model, log = load_model(tiny, torch.bfloat16), RunLog(tmp_path)
    blocks, head = weights(model)
    rank = fine_tune.Config().rank
    low_rank = sum(rank * (linear.in_features + linear.out_features) for linear in block_linears(model).values())
    expected = 4 * (blocks + head) * TOKENS + 6 * low_rank * TOKENS + attention(model)
    fine_tune.apply(model, Scheme.from_dict("none", {}), fine_tune.Config(), text(), log)
    # The gradient of the first block's inputs is not needed.
    assert 0.9 * expected < log.training["flops"] <= expected


def test_a_block_wise_training_counts_its_steps(tiny, tmp_path):
    model, log = load_model(tiny, torch.bfloat16), RunLog(tmp_path)
    blocks, _ = weights(model)
    config = block_ap.Config()
    block_ap.apply(model, SCHEME, config, text(), log)
    # Forward, gradient of inputs, gradient of weights; less the gradient of a block's own inputs.
    assert 4 * blocks * TOKENS * config.epochs < log.training["flops"] < 8 * blocks * TOKENS * config.epochs

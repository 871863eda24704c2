"""Forward and backward of each kind of training on SmolLM2-135M, as a ratio to low-rank fine-tuning, and where LR-QAT's goes.

python -m tests.bench.training        (about 6 minutes; needs a prepared model and its training tokens)
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch

from methods import dl_qat, fine_tune, llm_qat, lr_qat
from methods.core.job import runtime
from methods.core.model.anatomy import block_linears, replace_module
from methods.core.model.checkpoint import load_model
from methods.core.tokens import sample_windows
from methods.core.training.layers import insert, quantized_by
from methods.core.training.losses import distillation_loss, next_token_loss
from methods.core.training.parametrizations import Recomputed
from tests.bench.memory import MODEL, SCHEME, TOKENS
from tests.bench.table import Row, record

BATCH, SEQUENCE, ROUNDS = 4, 256, 4


def layers_of(model, make) -> None:
    insert(model, quantized_by(SCHEME, make))


def low_rank(model) -> None:
    """LoRA in every layer, as the training control has it."""
    for name, linear in block_linears(model).items():
        replace_module(model, name, fine_tune.Lora(linear, fine_tune.Config()))


def full(model) -> None:
    """All weights in fp32, as the control's other variant has them."""
    for name, linear in block_linears(model).items():
        replace_module(model, name, fine_tune.Full(linear, fine_tune.Config(variant="full")))


KINDS = {
    "low-rank fine-tuning": low_rank,
    **{
        f"LR-QAT, phi {phi}": lambda m, phi=phi: layers_of(
            m, lambda linear, grid: lr_qat.LowRank(linear, grid, lr_qat.Config(downcast=phi))
        )
        for phi in ("fixed", "int")
    },
    "DL-QAT": lambda m: layers_of(m, lambda linear, grid: dl_qat.Decomposed(linear, grid, dl_qat.Config())),
    "full fine-tuning": full,
    "LLM-QAT": lambda m: layers_of(m, lambda linear, grid: Recomputed(linear.weight.detach(), grid, llm_qat.Config())),
}


def step(model, loss, batch) -> float:
    start = time.perf_counter()
    loss(model, batch).backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    if not (MODEL.exists() and TOKENS.exists()):
        sys.exit(f"needs {MODEL} and {TOKENS}: snakemake --cores 8 -- {MODEL} {TOKENS}")
    runtime.set_up(None, 0)
    base = load_model(MODEL, runtime.compute_dtype(MODEL)).requires_grad_(False).to(runtime.device())
    batch = sample_windows(TOKENS, BATCH, SEQUENCE, 0)[0].to(runtime.device())
    models, losses, seconds = {}, {}, {}
    for name, change in KINDS.items():
        models[name] = copy.deepcopy(base)
        change(models[name])
        losses[name] = distillation_loss(base) if name == "LLM-QAT" else next_token_loss
        step(models[name], losses[name], batch)  # warm-up
        seconds[name] = []
    # Rounds over all kinds, so that a slow moment of the machine hits them alike.
    for _ in range(ROUNDS):
        for name in KINDS:
            seconds[name].append(step(models[name], losses[name], batch))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians["low-rank fine-tuning"]
    print(f"SmolLM2-135M, {BATCH} x {SEQUENCE} tokens, W4 g64, {torch.get_num_threads()} threads, median of {ROUNDS}")
    for name, values in seconds.items():
        print(
            f"{name:24} {medians[name]:6.2f} s ({min(values):.2f} to {max(values):.2f})  {medians[name] / reference:.2f} x"
        )

    with torch.no_grad():
        forward = statistics.median(_seconds(lambda: base(input_ids=batch, use_cache=False)) for _ in range(ROUNDS))
    model = models["LR-QAT, phi fixed"]
    parametrizations = [m for m in model.modules() if isinstance(m, lr_qat.LowRank)]
    with torch.no_grad():
        weights = min(_seconds(lambda: [p() for p in parametrizations]) for _ in range(3))
    products = sum(2 * batch.numel() * p.phi.shape[0] * p.low_rank.b.shape[1] for p in parametrizations)
    print(f"a forward pass of the plain model: {forward:.2f} s; all weights of LR-QAT computed once: {weights:.2f} s")
    print(
        f"LR-QAT needs the gradient of every weight, which LoRA does not: {products / 1e9:.0f} GFLOP more, at this machine's "
        f"forward speed about {products / 1e9 / (_model_gflop(base, batch) / forward):.2f} s"
    )
    rows = [
        Row(f"forward and backward of {name}", medians[name], reference, "low-rank fine-tuning", 1.15)
        for name in ("LR-QAT, phi fixed", "LR-QAT, phi int", "DL-QAT")
    ]
    against = medians["full fine-tuning"] + forward
    record(
        [
            *rows,
            Row(
                "forward and backward of LLM-QAT", medians["LLM-QAT"], against, "full fine-tuning, and its teacher", 1.1
            ),
        ]
    )


def _model_gflop(model, batch) -> float:
    """Of the matrix products of one forward pass."""
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(2 * batch.numel() * m.in_features * m.out_features for m in linears) / 1e9


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

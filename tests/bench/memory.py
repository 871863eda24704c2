"""Training memory: measured on SmolLM2-135M, predicted for it, and computed for a 7B shape beside LR-QAT's paper.

python -m tests.bench.memory        (30 seconds a row, 14 rows; needs a prepared model and its training tokens)

Each row runs two steps in a process of its own on real text. What is measured is the most that tensors held at once, as
torch.cuda.max_memory_allocated() says on a GPU; a process needs more: its libraries, and what its allocator cannot reuse.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from methods import dl_qat, fine_tune, llm_qat, lr_qat
from methods.core.job import runtime
from methods.core.job.log import RunLog
from methods.core.model.anatomy import checkpoint_blocks
from methods.core.model.checkpoint import load_model
from methods.core.scheme import Scheme
from methods.core.tokens import sample_windows
from methods.core.training import layers

MODEL = Path("resources/models/smollm2-135m")
TOKENS = Path("resources/tokens/smollm2-135m/training.safetensors")
BATCH, SEQUENCE, STEPS = 1, 256, 2
ADAM = 8  # two fp32 moments per trained value
GRADIENT = 4
SCHEME = Scheme.from_dict("w4-g64", {"weights": {"bits": 4, "group_size": 64}})


def activation_bytes(config: PretrainedConfig, dtype_bytes: int) -> int:
    """What one decoder block of a Llama-like model keeps per token for the backward pass, its layers frozen or trained.

    Two norms keep their input in fp32 and hand on their output; attention keeps queries, keys, values and its output, which
    o_proj reads; the MLP keeps both projections, the activation and their product.
    """
    c = config.get_text_config()
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = head * c.num_attention_heads, head * c.num_key_value_heads
    return 2 * c.hidden_size * 4 + dtype_bytes * (2 * c.hidden_size + 2 * queries + 2 * keys + 4 * c.intermediate_size)


def training_peak(
    config: PretrainedConfig,
    tokens: int,
    dtype_bytes: int,
    static: float,
    trained: int,
    distills: bool = False,
    checkpointing: bool = False,
) -> float:
    """Peak bytes of a training step on `tokens` tokens per forward pass.

    static: bytes of what is there before the first step, trained values in fp32 and a teacher included. The optimizer's
    moments are always there; activations and logits are highest when the loss is computed, gradients when the backward
    pass has ended, and both move linearly in between, so the peak is at one of the two ends.
    """
    c = config.get_text_config()
    block = tokens * activation_bytes(config, dtype_bytes)
    kept = c.num_hidden_layers * (tokens * c.hidden_size * dtype_bytes if checkpointing else block)
    # The logits, their gradient, and the teacher's logits.
    logits = tokens * c.vocab_size * dtype_bytes * (3 if distills else 2)
    # A layer's weight is computed in fp32 from its parts, a few such tensors at a time.
    temporaries = 4 * 4 * c.hidden_size * c.intermediate_size
    at_loss = kept + max(logits, block if checkpointing else 0)
    at_end = GRADIENT * trained + (block if checkpointing else 0)
    return static + ADAM * trained + max(at_loss, at_end) + temporaries


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train: its module and options, and what it keeps per weight of the decoder blocks' linear layers."""

    name: str
    module: object
    options: dict
    frozen: float | None  # bytes per weight; None for the dtype that the model computes in
    trains: str = "low rank"  # or "weights"
    teacher: bool = False
    paper: str = ""  # GB for LLaMA-2-7B in LR-QAT's figure


ROWS = (
    Row("LLM-QAT: all weights, with a teacher", llm_qat, {}, 0, "weights", teacher=True),
    Row("all weights, no teacher", fine_tune, {"variant": "full"}, None, "weights", paper="98 (62 with checkpointing)"),
    Row("LR-QAT, phi fp32", lr_qat, {"downcast": "float32"}, 4),
    Row("LR-QAT, phi bf16", lr_qat, {"downcast": "bfloat16"}, 2),
    Row("LR-QAT, phi fixed point (Q4.4)", lr_qat, {"downcast": "fixed"}, 1, paper="20.5"),
    Row("LR-QAT, phi int (two to a byte)", lr_qat, {"downcast": "int"}, 0.5, paper="17.5"),
    Row("DL-QAT", dl_qat, {}, None),
)


def counts(config, row: Row, group_size: int) -> tuple[int, int, int]:
    """Weights of the blocks' linear layers, all other parameters, and trained values, of a Llama-like shape."""
    head = config.hidden_size // config.num_attention_heads
    keys = head * config.num_key_value_heads
    h, i = config.hidden_size, config.intermediate_size
    shapes = [(h, h), (keys, h), (keys, h), (h, h), (i, h), (i, h), (h, i)]
    weights = config.num_hidden_layers * sum(a * b for a, b in shapes)
    embeddings = config.vocab_size * h * (1 if config.tie_word_embeddings else 2)
    other = embeddings + h * (2 * config.num_hidden_layers + 1)
    if row.trains == "weights":
        return weights, other, weights
    rank = row.module.Config(**row.options).rank
    groups = weights // group_size
    return weights, other, groups + config.num_hidden_layers * rank * sum(a + b for a, b in shapes)


def predicted(
    config, row: Row, tokens: int, dtype_bytes: int, group_size: int, checkpointing: bool
) -> tuple[float, float]:
    """Peak bytes of a row on a Llama-like shape, and the share of the parameters that it trains."""
    weights, other, trained = counts(config, row, group_size)
    frozen = weights * (dtype_bytes if row.frozen is None else row.frozen)
    if row.trains == "weights" and dtype_bytes == GRADIENT:
        frozen = 0  # the trained weight itself is multiplied; in another dtype autograd keeps a cast copy of it
    teacher = row.teacher * (weights + other) * dtype_bytes
    fixed_scales = 2 * weights / group_size if row.module is dl_qat else 0
    static = other * dtype_bytes + frozen + fixed_scales + 4 * trained + teacher
    peak = training_peak(config, tokens, dtype_bytes, static, trained, row.teacher, checkpointing)
    return peak, trained / (weights + other)


class LiveBytes(TorchDispatchMode):
    """The most bytes that the storages seen by operations, and those of the modules handed over, held at once."""

    def __init__(self, *modules: torch.nn.Module):
        super().__init__()
        self.live: dict[int, int] = {}
        self.total = self.peak = 0
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.track(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.track, result)
        return result

    def track(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.live:
            self.live[key] = storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self.forget, key)
        return tensor

    def forget(self, key: int) -> None:
        self.total -= self.live.pop(key)


def measure(index: int, checkpointing: bool) -> None:
    """Train row `index` and print its peak. Runs in its own process."""
    row = ROWS[index]
    runtime.set_up(None, 0)
    real = layers.train
    peaks = []

    def watched(model, *arguments):
        with LiveBytes(model, *_teachers(arguments)) as tensors:
            real(model, *arguments)
        peaks.append(tensors.peak)

    layers.train = watched
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(MODEL, torch.float32)
        tokens, _ = sample_windows(TOKENS, STEPS * BATCH, SEQUENCE, 0)
        if checkpointing:
            checkpoint_blocks(model)
        config = row.module.Config(**row.options)
        row.module.apply(model, SCHEME, config, tokens.view(STEPS, 1, BATCH, SEQUENCE), RunLog(Path(folder)))
    print(json.dumps({"peak": peaks[0]}))


def _teachers(arguments) -> list[torch.nn.Module]:
    """The models that a loss function holds."""
    cells = [cell.cell_contents for a in arguments if callable(a) for cell in a.__closure__ or ()]
    return [value for value in cells if isinstance(value, torch.nn.Module)]


def main() -> None:
    if not (MODEL.exists() and TOKENS.exists()):
        sys.exit(f"needs {MODEL} and {TOKENS}: snakemake --cores 8 -- {MODEL} {TOKENS}")
    small, large = AutoConfig.from_pretrained(MODEL), LlamaConfig()
    rows = []
    for index, row in enumerate(ROWS):
        for checkpointing in (False, True):
            command = [sys.executable, "-m", "tests.bench.memory", str(index), str(int(checkpointing))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak = json.loads(done.stdout.splitlines()[-1])["peak"]
            guess, share = predicted(small, row, BATCH * SEQUENCE, 4, 64, checkpointing)
            seven, large_share = predicted(large, row, 1024, 2, 128, checkpointing)
            rows.append(
                {
                    "training": row.name + (", checkpointing" if checkpointing else ""),
                    "measured GB": f"{peak / 1e9:.2f}",
                    "predicted GB": f"{guess / 1e9:.2f}",
                    "error": f"{100 * (guess / peak - 1):+.0f} %",
                    "trained": f"{100 * share:.1f} %",
                    "7B, computed GB": f"{seven / 1e9:.1f}",
                    "7B, trained": f"{100 * large_share:.2f} %",
                    "7B in LR-QAT's paper, GB": "" if checkpointing else row.paper,
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr)
    print(
        f"SmolLM2-135M, W4 g64, {BATCH} x {SEQUENCE} tokens, fp32, this machine; 7B: the shape of LLaMA-7B, W4 g128, "
        "1 x 1024 tokens, bf16 products, trained values and their moments in fp32.\n"
    )
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), bool(int(sys.argv[2])))
    else:
        main()

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
from types import ModuleType

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig

from methods import dl_qat, fine_tune, llm_qat, lr_qat
from methods.core.job import runtime
from methods.core.job.log import RunLog
from methods.core.model.anatomy import checkpoint_blocks
from methods.core.model.checkpoint import load_model
from methods.core.scheme import Scheme
from methods.core.tokens import sample_windows
from methods.core.training import layers
from workflow.needs import trained_values, training_peak
from workflow.shapes import Shape, shape_of

MODEL = Path("resources/models/smollm2-135m")
TOKENS = Path("resources/tokens/smollm2-135m/training.safetensors")
BATCH, SEQUENCE, STEPS = 1, 256, 2
SCHEME = Scheme.from_dict("w4-g64", {"weights": {"bits": 4, "group_size": 64}})


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train: its module and options."""

    name: str
    module: ModuleType
    options: dict
    paper: str = ""  # GB for LLaMA-2-7B in LR-QAT's figure


ROWS = (
    Row("LLM-QAT: all weights, with a teacher", llm_qat, {}),
    Row("all weights, no teacher", fine_tune, {"variant": "full"}, paper="98 (62 with checkpointing)"),
    Row("LR-QAT, phi fp32", lr_qat, {"downcast": "float32"}),
    Row("LR-QAT, phi bf16", lr_qat, {"downcast": "bfloat16"}),
    Row("LR-QAT, phi fixed point (Q4.4)", lr_qat, {"downcast": "fixed"}, paper="20.5"),
    Row("LR-QAT, phi int (two to a byte)", lr_qat, {"downcast": "int"}, paper="17.5"),
    Row("DL-QAT", dl_qat, {}),
)


def predicted(shape: Shape, row: Row, tokens: int, width: int, checkpointing: bool) -> tuple[float, float]:
    """Peak bytes of a row on a shape, and the share of the parameters that it trains."""
    held = row.module.held(row.module.Config(**row.options), samples=1)
    share = trained_values(shape, held) / (shape.weights + shape.others)
    return training_peak(shape, held, tokens, width, checkpointing), share


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
    small, large = shape_of(MODEL), Shape.of(LlamaConfig().to_dict())
    rows = []
    for index, row in enumerate(ROWS):
        for checkpointing in (False, True):
            command = [sys.executable, "-m", "tests.bench.memory", str(index), str(int(checkpointing))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak = json.loads(done.stdout.splitlines()[-1])["peak"]
            guess, share = predicted(small, row, BATCH * SEQUENCE, 4, checkpointing)
            seven, large_share = predicted(large, row, 1024, 2, checkpointing)
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
        f"SmolLM2-135M, W4 g64, {BATCH} x {SEQUENCE} tokens, fp32, this machine; 7B: the shape of LLaMA-7B, "
        "1 x 1024 tokens, bf16 products, trained values and their moments in fp32.\n"
    )
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), bool(int(sys.argv[2])))
    else:
        main()

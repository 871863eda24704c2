"""What a step and an evaluation hold of a model that is treated as a large one, and as one that fits into memory.

python -m tests.bench.large        (2 minutes)

A random model of 64 blocks in float32, 4 bits, min-max scales. Bytes beyond those of Python and its libraries; pages of files
do not count, since the kernel takes them back (tests/test_large.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd

from methods.core.job.runtime import processor
from tests.test_large import evaluated, many_blocks, rounded


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = many_blocks(folder)
        tokens = ["--tokens", folder / "t.safetensors", "--samples", 16, "--sequence-length", 32]
        kinds = {
            "RTN": lambda large: rounded(model, large, folder / f"rtn-{large}"),
            "GPTQ": lambda large: rounded(model, large, folder / f"gptq-{large}", "gptq", *tokens),
            "evaluation": lambda large: evaluated(model, large, folder / "rtn-True/checkpoint", folder / str(large)),
        }
        rows = [
            {"": name, "large": f"{held(True) / 1e6:.0f} MB", "not": f"{held(False) / 1e6:.0f} MB"}
            for name, held in kinds.items()
        ]
        size = (model / "model.safetensors").stat().st_size
    print(f"a model of {size / 1e6:.0f} MB; {processor()}\n")
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    main()

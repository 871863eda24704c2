"""In which dtype do shared prefixes choose the same answers as lm-eval's own model class, and how far are the numbers apart?

python -m tests.bench.agreement [--dtype bfloat16] [--limit 100]     (half an hour where bfloat16 is emulated)

Both score the same requests of some tasks with the same model in one process; lm-eval's class with its softmax in fp32 and in
its default, the model's dtype, and at two batch sizes, which already differ from each other in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from evals.core.language_model import PrefixSharingLM
from evals.core.tasks import load_task
from methods.core.job import runtime
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model

TASKS = Path("resources/tasks/embedded")


def choices(lm: HFLM, items: list) -> tuple[np.ndarray, np.ndarray, float]:
    """The choice of each item, all log-likelihoods, and the seconds it took."""
    start = time.perf_counter()
    values = [v for v, _ in lm.loglikelihood([r for item in items for r in item.requests], disable_tqdm=True)]
    seconds = time.perf_counter() - start
    stops = np.cumsum([len(item.requests) for item in items])[:-1]
    return np.array([part.argmax() for part in np.split(np.array(values), stops)]), np.array(values), seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("resources/models/smollm2-135m"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "piqa"])
    parser.add_argument("--limit", type=int, default=100, help="items per task")
    args = parser.parse_args()
    runtime.set_up(None, 0)
    model = load_model(args.model, getattr(torch, args.dtype)).to(runtime.device())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    items = [item for task in args.tasks for item in load_task(TASKS / task, 0, args.limit, 0).items]
    stock = {"pretrained": model, "tokenizer": tokenizer, "backend": "causal"}
    others = {
        "lm-eval, batch 1, softmax in fp32": HFLM(**stock, batch_size=1, softmax_dtype="float32"),
        "lm-eval, batch 8, softmax in fp32": HFLM(**stock, batch_size=8, softmax_dtype="float32"),
        "lm-eval, batch 1, its default": HFLM(**stock, batch_size=1),
    }
    mine, values, seconds = choices(PrefixSharingLM(model, tokenizer, RunLog()), items)
    rows = [{"scored by": "shared prefixes", "s": f"{seconds:.0f}"}]
    first = None
    for name, lm in others.items():
        theirs, expected, seconds = choices(lm, items)
        first = theirs if first is None else first
        row = {"scored by": name, "same choice as ours": f"{(mine == theirs).mean():.2%}"}
        row |= {"same choice as batch 1": f"{(first == theirs).mean():.2%}"}
        row |= {"median difference, nats": f"{np.median(np.abs(values - expected)):.2g}"}
        rows.append(row | {"largest": f"{np.abs(values - expected).max():.2g}", "s": f"{seconds:.0f}"})
    print(f"{len(items)} items of {', '.join(args.tasks)}, {args.dtype}")
    print(pd.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()

"""Zero-shot tasks and MMLU: the stock `lm_eval` command against `python -m evals`, same checkpoint, items and dtype.

python -m tests.bench.evaluation [--limit 200] [--subjects 15]        (about half an hour on two cores with these)

Prints the accuracies and times of both, and the limit of any evaluator that shares prefixes: the distinct prefixes of the
requests at the speed of plain forward passes of 4 x 512 tokens. Stock lm-eval gets the batch size, of 1, 4 and 16, that is
fastest on a tenth of the items. Needs the prepared model, and the items under resources/tasks/embedded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import torch
import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from evals.core.definitions import task_folder
from evals.core.language_model import PrefixSharingLM
from evals.core.prefix import Trie
from evals.core.tasks import chosen_rows, load_task
from methods.core.job import runtime
from methods.core.job.files import read_json
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from tests.bench.table import Row, record

TASKS = Path("resources/tasks/embedded")
ZERO_SHOT = {
    "HellaSwag": ["hellaswag"],
    "ARC": ["arc_easy", "arc_challenge"],
    "PIQA, WinoGrande, BoolQ": ["piqa", "winogrande", "boolq"],
}
BATCHES = (1, 4, 16)
GOALS = {"HellaSwag": 2.2, "ARC": 3, "MMLU 5-shot": 6, "all": 4}  # times faster than lm-eval


def overlay(folder: Path, task: Path, limit: int | None) -> None:
    """lm-eval's definition of a task on the very items that we score, for the stock command's --include_path."""
    about = read_json(task / "task.json")
    stock = load_yaml(task_folder() / about["definition"], resolve_func=False)
    scored = stock.get("test_split") or stock["validation_split"]
    files = {}
    for split in about["splits"]:
        table = pq.read_table(task / f"{split}.parquet")
        if split == scored:
            table = table.take(chosen_rows(about["task"], len(table), limit, seed=0))
        files[split] = str(folder / f"{about['task']}-{split}.parquet")
        pq.write_table(table, files[split])
    local = {"include": str(task_folder() / about["definition"]), "task": about["task"]}
    local |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    local |= {k: None for k in ("training_split", "validation_split") if stock.get(k) and stock[k] not in files}
    (folder / f"{about['task']}.yaml").write_text(yaml.safe_dump(local))


def stock(model: Path, tasks: list[Path], shots: int, limit: int, batch: int) -> tuple[dict[str, list[bool]], float]:
    """Which items the stock command gets right, by task, and its wall seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in tasks:
            overlay(folder, task, limit)
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        command += [
            "--model_args",
            f"pretrained={model},dtype={runtime.compute_dtype(model)}".replace("torch.", ""),
            "--tasks",
            ",".join(t.name for t in tasks),
        ]
        command += [
            "--device",
            str(runtime.device()),
            "--batch_size",
            str(batch),
            "--num_fewshot",
            str(shots),
            "--log_samples",
        ]
        command += ["--include_path", name, "--output_path", f"{name}/out"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{name}/cache"}
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        right = {}
        for path in folder.glob("out/**/samples_*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            task = next(t.name for t in tasks if path.name.startswith(f"samples_{t.name}_2"))
            right[task] = [bool(r["acc"]) for r in sorted(rows, key=lambda r: r["doc_id"])]
        return right, seconds


def ours(model: Path, evaluation: str, entry: dict) -> tuple[pd.DataFrame, float, float]:
    """The items of our result, the command's wall seconds, and those of the evaluation without loading the model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "evals", json.dumps({evaluation: entry})]
        command += ["--checkpoint", str(model), "--output", folder]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        result = read_json(f"{folder}/{evaluation}.json")
        return pd.read_parquet(f"{folder}/{evaluation}.parquet"), seconds, result["seconds"]


def requests_of(tasks: list[Path], shots: int, limit: int) -> list:
    return [r for t in tasks for item in load_task(t, shots, limit, 0).items for r in item.requests]


def best_batch(lm: PrefixSharingLM, requests: list) -> int:
    """The batch size at which stock lm-eval's model class is fastest on these requests."""
    seconds = {}
    for batch in BATCHES:
        lm.batch_size_per_gpu = batch
        start = time.perf_counter()
        tokens = [(r.args, *lm._encode_pair(*r.args)) for r in requests]
        super(PrefixSharingLM, lm)._loglikelihood_tokens(tokens, disable_tqdm=True)
        seconds[batch] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def distinct_prefixes(lm: PrefixSharingLM, requests: list) -> int:
    """Tokens that any evaluator of these requests has to compute at least once."""
    pairs = [lm._encode_pair(*r.args) for r in requests]
    return len(Trie.of([c + k[:-1] for c, k in pairs], [1] * len(pairs)))


def forward_speed(model) -> float:
    """Tokens per second of plain forward passes, best of three."""
    tokens = torch.randint(0, model.config.vocab_size, (4, 512), device=model.device)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            model(input_ids=tokens, use_cache=False)
            seconds.append(time.perf_counter() - start)
    return tokens.numel() / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("resources/models/smollm2-135m"))
    parser.add_argument("--limit", type=int, default=200, help="items per zero-shot task (default 200)")
    parser.add_argument("--subjects", type=int, default=15, help="of MMLU, 20 questions each (default 15, all: 57)")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    every = sorted(p.parent for p in TASKS.glob("mmlu/*/task.json"))
    subjects = every[:: max(1, len(every) // args.subjects)][: args.subjects]
    groups = {name: ([TASKS / t for t in tasks], 0, args.limit) for name, tasks in ZERO_SHOT.items()}
    groups[f"MMLU 5-shot, {len(subjects)} subjects"] = (subjects, 5, 20)
    runtime.set_up(None, 0)
    model = load_model(args.model, runtime.compute_dtype(args.model)).to(runtime.device())
    lm = PrefixSharingLM(model, AutoTokenizer.from_pretrained(args.model), RunLog())
    speed = forward_speed(model)
    plans = {}
    with contextlib.redirect_stderr(io.StringIO()):
        for name, (tasks, shots, limit) in groups.items():
            requests = requests_of(tasks, shots, limit)
            tenth = sorted(requests_of(tasks, shots, max(1, limit // 10)), key=lambda r: r.args)
            plans[name] = best_batch(lm, tenth), distinct_prefixes(lm, requests) / speed
    del model, lm

    accuracies, times = [], []
    for name, (tasks, shots, limit) in groups.items():
        batch, least = plans[name]
        print(f"{name}: stock lm-eval at batch {batch} ...", file=sys.stderr, flush=True)
        right, stock_seconds = stock(args.model, tasks, shots, limit, batch)
        print(f"{name}: {stock_seconds:.0f} s; ours ...", file=sys.stderr, flush=True)
        if shots:
            entry = {"data": [str(TASKS / "mmlu")]}
            entry["options"] = {"limit": limit, "subjects": [t.name.removeprefix("mmlu_") for t in tasks]}
            items, seconds, evaluating = ours(args.model, "mmlu", entry)
        else:
            entry = {"data": [str(t) for t in tasks], "options": {"tasks": [t.name for t in tasks], "limit": limit}}
            items, seconds, evaluating = ours(args.model, "zero_shot", entry)
        for task in tasks:
            mine = items[items["task"] == task.name]["acc"].astype(bool).tolist()
            different = sum(a != b for a, b in zip(mine, right[task.name], strict=True))
            accuracies.append({"task": task.name, "items": len(mine), "lm_eval": pd.Series(right[task.name]).mean()})
            accuracies[-1] |= {"ours": pd.Series(mine).mean(), "items that differ": different}
        times.append({"tasks": name, "lm_eval batch": batch, "lm_eval s": stock_seconds, "ours s": seconds})
        times[-1] |= {"ratio": stock_seconds / seconds, "evaluating s": evaluating, "limit s": least}
        times[-1] |= {"share of the limit": least / evaluating}
    total = {k: sum(row[k] for row in times) for k in ("lm_eval s", "ours s", "evaluating s", "limit s")}
    total |= {"tasks": "all", "lm_eval batch": "", "ratio": total["lm_eval s"] / total["ours s"]}
    total["share of the limit"] = total["limit s"] / total["evaluating s"]
    table = pd.DataFrame([*times, total])
    print(pd.DataFrame(accuracies).to_markdown(index=False, floatfmt=".4f"))
    print(f"\nplain forward passes: {speed:.0f} tokens/s\n")
    print(table.to_markdown(index=False, floatfmt=".2f"))
    rows = []
    for row in (*times, total):
        goal = GOALS.get(row["tasks"].split(",")[0])
        against = "lm-eval at its best batch size"
        rows.append(Row(row["tasks"], row["ours s"], row["lm_eval s"], against, goal and 1 / goal))
    record(rows)


if __name__ == "__main__":
    main()

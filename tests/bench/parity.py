"""GPTQ and AutoRound against the packages GPTQModel and auto-round: perplexity, time and memory on SmolLM2-135M.

python -m tests.bench.parity [--blocks 4] [--steps 50 200]      (20 minutes on two cores with AVX512-BF16)

All get the same calibration windows and round the linear layers of the first blocks to 4 and 3 bits in symmetric groups of
64, each in a process of its own with the same threads. The packages run in environments under resources/peers, made at the
first use (3 GB), with our versions of torch and transformers; one that cannot be installed is left out and the reason is
printed. They keep their defaults unless a row says otherwise: auto-round's steps see twice as many sequences as ours.

The grids differ. Ours is `s = max |w| / (2^(b-1) - 1)` by min-max, and searched, with a sign, by default; GPTQModel's is
`s = max |w| / (2^(b-1) - 1/2)`; auto-round's has the sign with which the largest weight gets the end with one level more.

Time is that of the call that quantizes: calibration, and in GPTQModel the packing (2 % of it), but neither imports nor
loading nor saving. Compare times of an idle machine only: beside other work the same runs took several times as long, and as
many more CPU seconds (those of all threads), since threads that wait for each other spin. Memory is the process's peak by the
end of the call. The weights come back dequantized, and one code makes all perplexities, in the dtype that ours computes in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
import transformers
from safetensors.torch import load_file, save_file

from evals.perplexity import token_nll
from methods.core.job import runtime
from methods.core.job.files import read_json
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.tokens import read_windows, sample_windows
from tests.bench.table import Row, record

MODEL = Path("resources/models/smollm2-135m")
TOKENS = Path("resources/tokens/smollm2-135m")
SAMPLES, LENGTH, GROUP = 32, 512, 64
PACKAGES = {"gptqmodel": "7.6.0", "auto-round": "0.16.1"}
MINMAX = {"scale": "minmax", "act_order": False, "static_groups": False, "true_sequential": False}
PAPER = {"desc_act": False, "act_group_aware": False, "true_sequential": False, "damp_percent": 0.01}
GPTQ = [  # our options and theirs
    ({}, {}),
    ({}, {"desc_act": True}),
    (MINMAX, PAPER),
]

# The programs. Each defines `quantize()` and what `weights` it leaves, by layer; `ids` are the calibration windows.
BEGIN = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file
job = json.loads(sys.argv[1])
ids, options = load_file(job["ids"])["ids"], job["options"]
"""
END = """
started, busy = time.perf_counter(), time.process_time()
model = quantize()
cost = {"s": time.perf_counter() - started, "CPU s": time.process_time() - busy}
# (getrusage has the peak of the process that started this one, where that was higher.)
cost["MB"] = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
save_file({name: weight.detach().contiguous() for name, weight in weights(model)}, job["weights"])
print(json.dumps(cost))
"""
OURS = """
from methods.core.job import registry, runtime
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.model.layers import quantized_layers
from methods.core.scheme import Scheme
runtime.set_up(None, 0)
model = load_model(job["model"], runtime.compute_dtype(job["model"]))
scheme = Scheme.from_dict("", {"weights": {"bits": job["bits"], "group_size": job["group"]}})
method = registry.load("methods", job["method"])
def quantize():
    return method.apply(model, scheme, method.Config(**options), ids, RunLog())
def weights(model):
    return ((name, layer.weight) for name, layer in quantized_layers(model).items())
"""
GPTQMODEL = """
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
config = QuantizeConfig(bits=job["bits"], group_size=job["group"], sym=True, offload_to_disk=False, **options)
loaded = GPTQModel.load(job["model"], config, device="cpu")
samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
def quantize():
    loaded.quantize(samples)
def weights(_):
    loaded.save(job["saved"])  # only what it has loaded again has the zero points that it dequantizes with
    model = GPTQModel.load(job["saved"], device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            layer.scales.data = layer.scales.data.float()
            yield name, layer.dequantize_weight().T
"""
AUTO_ROUND = """
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
loaded = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(job["model"])
samples = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids.split(8)]
options |= {"bits": job["bits"], "group_size": job["group"], "sym": True}
options |= {"dataset": samples, "nsamples": len(ids), "seqlen": ids.shape[1]}
def quantize():
    return AutoRound(loaded, tokenizer, device_map="cpu", **options).quantize()[0]
def weights(model):
    return ((name, layer.weight) for name, layer in model.named_modules() if hasattr(layer, "scale"))
"""
PROGRAMS = {"gptqmodel": GPTQMODEL, "auto-round": AUTO_ROUND}


def environment(package: str, folder: Path) -> str | None:
    """The Python that has the package, installed there if it is not yet; None, and the reason printed, if that fails."""
    python = folder / package / "bin" / "python"
    wanted = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
    steps = [] if python.exists() else [[sys.executable, "-m", "venv", str(folder / package)]]
    steps.append([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted])
    steps[-1].append(f"{package}=={PACKAGES[package]}")
    steps.append([str(python), "-c", f"import {package.replace('-', '_')}"])
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
            print(f"{package} {PACKAGES[package]} is left out: {reason.splitlines()[-1]}")
            return None
    return str(python)


def first_blocks(folder: Path, blocks: int) -> Path:
    """A model of the first blocks only: what a method that goes block by block makes of these is the same."""
    folder.mkdir()
    for path in MODEL.glob("*.*"):
        if path.name not in ("config.json", "manifest.json"):  # which has the hash of config.json
            (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").write_text(json.dumps(read_json(MODEL / "config.json") | {"num_hidden_layers": blocks}))
    return folder


def measured(python: str, program: str, job: dict) -> dict:
    """What a program took."""
    threads = str(torch.get_num_threads())
    variables = os.environ | {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": threads, "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", BEGIN + program + END, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def perplexity(weights: Path | None) -> float:
    """Of the model on SQuAD, with these weights of some layers."""
    model = load_model(MODEL, runtime.compute_dtype(MODEL))
    for name, weight in (load_file(weights) if weights else {}).items():
        model.get_submodule(name).weight.data.copy_(weight)
    windows = read_windows(TOKENS / "squad.safetensors", LENGTH)[0][:SAMPLES]
    return float(token_nll(model, windows, 4, RunLog()).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.parity", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--blocks", type=int, default=4, help="of the model's 30, the others in full precision (default 4)"
    )
    parser.add_argument("--steps", type=int, nargs="*", default=[50, 200], help="of AutoRound (default 50 200)")
    parser.add_argument("--environments", type=Path, default=Path("resources/peers"), metavar="FOLDER")
    args = parser.parse_args()
    needed = [MODEL, TOKENS / "calibration.safetensors", TOKENS / "squad.safetensors"]
    if missing := [str(path) for path in needed if not path.exists()]:
        sys.exit(f"needs {' '.join(missing)}: snakemake --cores 8 -- {' '.join(missing)}")
    runtime.set_up(None, 0)
    pythons = {package: environment(package, args.environments) for package in PACKAGES}
    pairs = [("gptq", "gptqmodel", *options) for options in GPTQ]
    pairs += [("auto_round", "auto-round", {"steps": steps}, {"iters": steps}) for steps in args.steps]
    pairs = [pair for pair in pairs if pythons[pair[1]]]
    found: dict[str, dict] = {}
    rows, times = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, _ = sample_windows(TOKENS / "calibration.safetensors", SAMPLES, LENGTH, seed=0)
        save_file({"ids": tokens}, folder / "ids")
        model = first_blocks(folder / "model", args.blocks)
        common = {"model": str(model), "ids": str(folder / "ids"), "saved": str(folder / "saved")}
        common |= {"weights": str(folder / "weights"), "group": GROUP}
        if pythons["gptqmodel"]:  # it compiles its packing at the first use
            short = common | {"model": str(first_blocks(folder / "short", 1)), "bits": 4, "options": {}}
            measured(pythons["gptqmodel"], GPTQMODEL, short)

        def result(python: str, program: str, method: str, bits: int, options: dict) -> dict:
            job = common | {"method": method, "bits": bits, "options": options}
            key = json.dumps([method, bits, options])
            if key not in found:
                found[key] = measured(python, program, job) | {"perplexity": perplexity(folder / "weights")}
                print(key, found[key], file=sys.stderr, flush=True)
            return found[key]

        for bits in (4, 3):
            for method, package, mine, theirs in pairs:
                sides = {
                    "ours": result(sys.executable, OURS, method, bits, mine),
                    "theirs": result(pythons[package], PROGRAMS[package], package, bits, theirs),
                }
                named = {"ours": method + (" (minmax)" if mine == MINMAX else ""), "theirs": package}
                row = {"bits": bits, **named, "their options": ", ".join(f"{k} {v}" for k, v in theirs.items())}
                for what in ("perplexity", "s", "CPU s", "MB"):
                    ours, other = (side[what] for side in sides.values())
                    digits = 3 if what == "perplexity" else 0
                    row[f"{what}, ours / theirs"] = (
                        f"{ours:.{digits}f} / {other:.{digits}f} = {ours / other:.{digits or 2}f}"
                    )
                rows.append(row)
                what = f"{named['ours']}, {bits} bits, {args.blocks} blocks of SmolLM2-135M"
                against = " ".join(filter(None, [package, row["their options"]]))
                goal = 0.5 if method == "gptq" else None
                times.append(Row(what, sides["ours"]["s"], sides["theirs"]["s"], against, goal))
    dtype = runtime.dtype_name(runtime.compute_dtype(MODEL))
    print(f"SmolLM2-135M, its first {args.blocks} blocks, groups of {GROUP}, {SAMPLES} x {LENGTH} tokens, {dtype}")
    print(f"{runtime.processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}")
    print(f"perplexity on {SAMPLES} x {LENGTH} tokens of SQuAD; in full precision {perplexity(None):.3f}\n")
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    record(times)


if __name__ == "__main__":
    main()

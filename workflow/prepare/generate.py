"""Training text that a model generates itself, by LLM-QAT's hybrid sampling (Liu et al., arXiv 2305.17888, section 2.1).

Each sequence starts from a random token of the vocabulary, after BOS where the tokenizer adds it, takes the most likely token
at the next 3 to 5 positions, which keeps its beginning sensible, and is then sampled from the softmax at temperature 1, which
makes it varied, up to the length or the end-of-sentence token.

python -m workflow.prepare.generate --model resources/models/micro --tokens 20480 --sequence-length 256 --output OUT

Writes OUT, a token file (.safetensors) like those of texts with the sequences one after another, without their BOS, and
beside it the manifest (.json). Each batch of sequences has a random generator of its own and is kept as soon as it is done,
so an interrupted run continues and ends with the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from methods.core.job import runtime
from methods.core.job.files import exclusive, keep_or_clear, read_json, write_json
from methods.core.job.tensors import read_state, write_sealed
from methods.core.model.checkpoint import load_model
from methods.core.tokens import added_bos, bos_facts, check_length, load_tokenizer, write_tokens
from workflow.prepare import GENERATED

GREEDY = (3, 5)  # positions after the first that take the most likely token, at least and at most


def end_tokens(model: nn.Module) -> list[int]:
    """The ids that end a sentence; empty if the model names none."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def generate_batch(
    model: nn.Module, count: int, length: int, generator: torch.Generator, bos: int | None = None
) -> list[list[int]]:
    """`count` sequences of at most `length` tokens, the first of each drawn uniformly from the vocabulary.

    With `bos`, each follows that token, which counts in its length and is not returned.
    A sequence that has ended leaves the batch and the cache, so the others do not pay for it. The model must be on the
    generator's device.
    """
    from transformers import DynamicCache

    device = generator.device
    ends = torch.tensor(end_tokens(model), dtype=torch.long, device=device)
    current = torch.randint(model.config.get_text_config().vocab_size, (count,), generator=generator, device=device)
    greedy = torch.randint(GREEDY[0], GREEDY[1] + 1, (count,), generator=generator, device=device)
    sequences = [[token] for token in current.tolist()]
    going = torch.arange(count, device=device)
    cache = DynamicCache()
    inputs = current[:, None] if bos is None else F.pad(current[:, None], (1, 0), value=bos)
    for position in range(1, length - (bos is not None)):
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        sampled = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
        current = torch.where(position <= greedy[going], logits.argmax(-1), sampled)
        for sequence, token in zip(going.tolist(), current.tolist(), strict=True):
            sequences[sequence].append(token)
        stay = ~torch.isin(current, ends)
        if not stay.any():
            break
        if not stay.all():
            cache.batch_select_indices(stay.nonzero()[:, 0])
            going, current = going[stay], current[stay]
        inputs = current[:, None]
    return sequences


def generate(
    model: nn.Module, tokens: int, length: int, batch_size: int, seed: int, folder: Path, bos: int | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Sequences, one after another, with at least `tokens` tokens together; their number, the number of those that ended, and
    the milliseconds they took.

    Each batch is stored in `folder`, and read from there if an earlier run has stored it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = set(end_tokens(model))
    parts: list[Tensor] = []
    counts = {"sequences": 0, "ended": 0, "milliseconds": 0}
    with tqdm(total=tokens, desc="generating", unit="token", mininterval=2, file=sys.stderr) as bar:
        while bar.n < tokens:
            part = folder / f"{len(parts):06d}.safetensors"
            state = read_state(part)
            if state is None:
                start = time.perf_counter()
                generator = torch.Generator(runtime.device()).manual_seed(seed * 1_000_003 + len(parts))
                needed = math.ceil((tokens - bar.n) / (length - (bos is not None)))
                count = min(batch_size, needed)  # the last batch has no more than are needed
                new = generate_batch(model, count, length, generator, bos)
                facts = {"sequences": len(new), "ended": sum(s[-1] in ends for s in new)}
                facts["milliseconds"] = round(1000 * (time.perf_counter() - start))
                ids = torch.tensor([t for s in new for t in s], dtype=torch.int32)
                state = {"input_ids": ids}, {k: str(v) for k, v in facts.items()}
                write_sealed(part, *state)
            tensors, info = state
            parts.append(tensors["input_ids"])
            counts = {k: v + int(info[k]) for k, v in counts.items()}
            bar.update(len(parts[-1]))
    return torch.cat(parts), counts


def write(args: argparse.Namespace) -> dict[str, Any]:
    """Generate and write the token file and its manifest."""
    runtime.set_up(args.threads, args.seed)
    dtype = runtime.compute_dtype(args.model)
    source = read_json(args.model / "manifest.json")
    tokenizer = load_tokenizer(args.model)
    bos = added_bos(tokenizer)
    settings = {
        "model": args.model.name,
        "model_sha256": source["sha256"],
        "at_least": args.tokens,
        "sampling": f"hybrid: random first token, {GREEDY[0]} to {GREEDY[1]} most likely ones, then temperature 1",
        "sequence_length": args.sequence_length,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "bos_token_id": bos,
        "compute_dtype": runtime.dtype_name(dtype),
    }
    parts = args.output.with_suffix(".parts")
    keep_or_clear(parts, settings)
    model = load_model(args.model, dtype).to(runtime.device())
    check_length(model, args.sequence_length, "sequence length")
    ids, counts = generate(model, args.tokens, args.sequence_length, args.batch_size, args.seed, parts / "batches", bos)
    manifest = settings | {
        "sequences": counts["sequences"],
        "ended": counts["ended"],
        "tokens": len(ids),
        "mean_length": round(len(ids) / counts["sequences"], 1),
        "text_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "seconds": counts["milliseconds"] / 1000,
        "provenance": runtime.provenance(),
    }
    info = {"model": args.model.name, "dataset": GENERATED} | bos_facts(tokenizer)
    info |= {k: str(manifest[k]) for k in ("tokens", "text_sha256", "model_sha256", "seconds")}
    write_json(args.output.with_suffix(".json"), manifest)
    write_tokens(args.output, ids, info)
    shutil.rmtree(parts)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.prepare.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared full-precision model")
    parser.add_argument("--tokens", type=int, required=True, help="least number of tokens of all sequences together")
    parser.add_argument("--sequence-length", type=int, required=True, help="longest sequence, in tokens")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences generated side by side (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path, required=True, help="token file; the manifest is written beside it")
    args = parser.parse_args()
    with exclusive(args.output):
        manifest = write(args)
    print(
        f"generated {manifest['tokens']:,} tokens in {manifest['sequences']} sequences, {manifest['ended']} of them ended "
        f"by the model, in {manifest['seconds']:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()

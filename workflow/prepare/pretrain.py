"""Train a small language model, a Llama with its own BPE tokenizer, from nothing.

The model of the tests has about a million parameters and takes about a minute. Quantization damages it as it damages large
models. Results are the same for the same seed, machine and number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from methods.core.job.files import atomic_path, exclusive, model_hashes, sha256_file, write_json
from methods.core.job.options import mapping


def train_tokenizer(text: Path, vocab_size: int):
    """A byte-level BPE tokenizer trained on the documents of `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(text, encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def train_model(tokenizer, text: Path, spec: dict[str, Any]):
    """The trained model, fp32. AdamW, linear warm-up and cosine decay, next-token loss on random windows."""
    import torch
    from torch.nn import functional as F
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    from methods.core.tokens import added_bos

    with open(text, encoding="utf-8") as lines:
        joined = "\n\n".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False).input_ids)
    bos = added_bos(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **spec["architecture"],
    )
    model = LlamaForCausalLM(config)
    budget = spec["training"]
    steps, batch, length = budget["steps"], budget["batch_size"], budget["sequence_length"]
    rate = budget["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / max(1, steps)))
    )
    generator = torch.Generator().manual_seed(budget["seed"])
    bar = tqdm(range(steps), desc="training", unit="step", mininterval=2, file=sys.stderr)
    for _ in bar:
        starts = torch.randint(len(ids) - length, (batch,), generator=generator).tolist()
        windows = torch.stack([ids[s : s + length + 1] for s in starts])
        if bos is not None:
            windows[:, 0] = bos
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", type=mapping, required=True, help="the model's entry in the configuration")
    parser.add_argument("--text", type=Path, required=True, help="documents.jsonl of the dataset to train on")
    parser.add_argument("--linear-width", type=int, action="append", default=[], help="checked; once for each width")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with exclusive(args.output):
        make(args)


def make(args: argparse.Namespace) -> None:
    """Train the model and write it to `args.output`."""
    import torch

    from methods.core.job import runtime
    from workflow.prepare.model import check_widths, set_bos

    spec = args.spec["train"]
    runtime.set_up(args.threads, spec["training"]["seed"])
    tokenizer = train_tokenizer(args.text, spec["vocab_size"])
    set_bos(tokenizer, args.spec)
    model = train_model(tokenizer, args.text, spec)
    check_widths(model, "the trained model", args.linear_width)
    with atomic_path(args.output) as folder:
        # The default is bfloat16, in which larger models are usually stored.
        model.to(getattr(torch, args.spec.get("dtype", "bfloat16"))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        manifest = {
            "spec": args.spec,
            "revision": None,
            "parameters": model.num_parameters(),
            **model_hashes(folder),
            "text_sha256": sha256_file(args.text),
        }
        write_json(folder / "manifest.json", manifest)


if __name__ == "__main__":
    main()

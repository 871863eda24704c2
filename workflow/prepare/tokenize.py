"""Tokenize one dataset with one model's tokenizer, once: documents.jsonl -> a stream of token ids.

The documents are joined by `join` and tokenized as one string, as in the GPTQ perplexity protocol. The stream has no BOS
token; the file notes whether the tokenizer adds one before a text (methods/core/tokens.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from methods.core.job.files import sha256_file
from methods.core.tokens import bos_facts, load_tokenizer, write_tokens

PIECE = 16_000_000  # characters


def pieces(path: Path, join: str) -> Iterator[str]:
    """The joined documents: one string, or several of about PIECE characters, cut between documents.

    A tokenizer needs 150 times the memory of its input. The texts of evaluations are shorter than PIECE, so
    they are tokenized whole.
    """
    documents, size = [], 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if size > PIECE:
                yield join.join([*documents, ""])
                documents, size = [], 0
            documents.append(json.loads(line)["text"])
            size += len(documents[-1])
    yield join.join(documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared model")
    parser.add_argument("--text", type=Path, required=True, help="documents.jsonl of the dataset")
    parser.add_argument("--dataset", required=True, help="name of the dataset in the configuration")
    parser.add_argument("--join", default="\n\n", help="between documents (default: two newlines)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    parts = []
    for piece in tqdm(pieces(args.text, args.join), desc=f"tokenizing {args.dataset}", unit="piece", file=sys.stderr):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        parts.append(torch.tensor(ids, dtype=torch.int32))
    ids = torch.cat(parts)
    info = {
        "dataset": args.dataset,
        "model": args.model.name,
        "tokens": str(len(ids)),
        "text_sha256": sha256_file(args.text),
        "tokenizer_sha256": sha256_file(args.model / "tokenizer.json"),
    } | bos_facts(tokenizer)
    write_tokens(args.output, ids, info)
    print(f"{args.dataset}: {len(ids):,} tokens", file=sys.stderr)


if __name__ == "__main__":
    main()

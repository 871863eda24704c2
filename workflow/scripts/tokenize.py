"""Tokenize one dataset with one model's tokenizer, once: documents.jsonl -> a stream of token ids.

The documents are joined by `join` and tokenized as one string with the tokenizer's own special tokens, as the GPTQ
perplexity protocol does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from methods.core.files import sha256_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared model")
    parser.add_argument("--text", type=Path, required=True, help="documents.jsonl of the dataset")
    parser.add_argument("--dataset", required=True, help="name of the dataset in the configuration")
    parser.add_argument("--join", default="\n\n", help="between documents (default: two newlines)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from methods.core.tokens import write_tokens

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    with open(args.text, encoding="utf-8") as lines:
        text = args.join.join(json.loads(line)["text"] for line in lines)
    print(f"tokenizing {len(text):,} characters of {args.dataset}", file=sys.stderr)
    ids = tokenizer(text, verbose=False).input_ids
    info = {
        "dataset": args.dataset,
        "model": args.model.name,
        "tokens": str(len(ids)),
        "text_sha256": sha256_file(args.text),
        "tokenizer_sha256": sha256_file(args.model / "tokenizer.json"),
    }
    write_tokens(args.output, ids, info)
    print(f"{args.dataset}: {len(ids):,} tokens", file=sys.stderr)


if __name__ == "__main__":
    main()

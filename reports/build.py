"""Build the report from result files: summary.md, summary.html, figures, tables, results.parquet.

python -m reports.build results/default/matrix.json --output reports/summary.md [--allow-missing]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from methods.core.job.files import atomic_path
from reports import figures, formats
from reports.content import Section, sections
from reports.figures import Figure
from reports.page import page
from reports.results import read_cells, read_matrix, tidy
from reports.tables import Table


def build(matrix_path: Path, output: Path, allow_missing: bool) -> None:
    """Write the report: OUTPUT, and beside it the page, figures/, tables/ and results.parquet.

    ValueError if a cell is missing and `allow_missing` is not set.
    """
    matrix = read_matrix(matrix_path)
    cells = read_cells(matrix, matrix_path.parent)
    absent = cells[cells["state"] != "done"]
    if len(absent) and not allow_missing:
        names = [f"{c.path}: {c.reason}" for c in absent.itertuples()]
        raise ValueError("cells without a result (--allow-missing reports the others):\n  " + "\n  ".join(names))
    found = sections(cells, matrix, matrix_path)
    title = f"Quantization benchmark: {matrix['name']}"
    with _drawing(found, output.parent / "figures"):
        _write_tables(found, output.parent / "tables")
        with atomic_path(output.with_name("results.parquet")) as temporary:
            tidy(cells).to_parquet(temporary)
        with atomic_path(output.with_suffix(".html")) as temporary:
            temporary.write_text(page(title, found), encoding="utf-8")
    with atomic_path(output) as temporary:
        temporary.write_text(_markdown(title, found), encoding="utf-8")
    print(f"wrote {output} and {output.with_suffix('.html').name}", file=sys.stderr)


def _markdown(title: str, found: list[Section]) -> str:
    parts = [f"# {title}"]
    for section in found:
        parts.append(f"{'#' * section.level} {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(formats.markdown(block))
            elif isinstance(block, Figure):
                parts += [f"![{section.title} of {block.model}](figures/{block.path})", f"*{block.caption}*"]
            else:
                parts.append(block)
    return "\n\n".join(parts) + "\n"


@contextmanager
def _drawing(found: list[Section], folder: Path) -> Iterator[None]:
    """Draws the figures in other processes while the block runs, and waits for them at its end.

    There is a folder for each kind of figure, empty if there is none, since Snakemake expects it.
    """
    drawn = [block for section in found for block in section.blocks if isinstance(block, Figure)]
    with ExitStack() as stack:
        folders = {kind: stack.enter_context(atomic_path(folder / kind)) for kind in figures.KINDS}
        for temporary in folders.values():
            temporary.mkdir(parents=True)
        # Not forked: a lock that some thread of this process holds would stay locked in the other.
        pool = stack.enter_context(ProcessPoolExecutor(mp_context=get_context("spawn")))
        jobs = [pool.submit(figures.save, figure, folders[figure.kind]) for figure in drawn]
        yield
        for job in tqdm(jobs, desc="drawing", unit="figure"):
            job.result()


def _write_tables(found: list[Section], folder: Path) -> None:
    """ValueError if the folder has something else than tables, which would be lost."""
    found_there = [path.name for path in folder.glob("[!.]*")]  # Snakemake puts a hidden time stamp there
    if others := [name for name in found_there if not name.endswith((".csv", ".tex"))]:
        raise ValueError(f"{folder} has files that are not of a report: {', '.join(others)}; choose another --output")
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for table in [block for section in found for block in section.blocks if isinstance(block, Table)]:
            (temporary / f"{table.name}.csv").write_text(formats.csv(table), encoding="utf-8")
            (temporary / f"{table.name}.tex").write_text(formats.latex(table), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reports.build", description=__doc__.splitlines()[0])
    parser.add_argument("matrix", type=Path, help="matrix.json of a result tree")
    parser.add_argument("--output", type=Path, default=Path("reports/summary.md"))
    parser.add_argument("--allow-missing", action="store_true", help="report what there is")
    args = parser.parse_args()
    try:
        build(args.matrix, args.output, args.allow_missing)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Build the report from result files: summary.md and summary.html, and beside them summary/ with tables, figures and numbers.

python -m reports.build results/default/matrix.json --output reports/summary.md [--allow-missing]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from methods.core.job.files import atomic_path
from reports.contents import contents
from reports.document import Figure, Section, Table
from reports.figures import titles
from reports.render import images, table
from reports.render.markdown import markdown
from reports.render.page import page
from reports.tree import read_results, tidy
from reports.verify import verify


def build(matrix_path: Path, output: Path, allow_missing: bool) -> None:
    """Write the report: OUTPUT, beside it the page, and in a folder of OUTPUT's name figures/, tables/ and results.parquet.

    ValueError if a cell is missing and `allow_missing` is not set.
    """
    folder = output.with_suffix("")
    if folder == output:
        raise ValueError(
            f"--output {output} has no suffix, and a folder of that name is made beside it; name it {output}.md"
        )
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # not forked: a lock that is held would stay so
        libraries = pool.submit(images.libraries)  # while the results are read
        results = read_results(matrix_path)
        absent = [f"{cell.path}: {cell.reason}" for cell in results.cells if cell.state != "done"]
        if absent and not allow_missing:
            raise ValueError("cells without a result (--allow-missing reports the others):\n  " + "\n  ".join(absent))
        verification = verify(matrix_path.parent, tensors=False)
        title, figures = f"Quantization benchmark: {results.matrix['name']}", f"{folder.name}/figures"
        with _drawing(pool, folder / "figures") as draw:
            sections = []
            for section in contents(results, folder.name, verification):
                draw(section)
                sections.append(section)
            _write_tables(sections, folder / "tables")
            with atomic_path(folder / "results.parquet") as temporary:
                tidy(results).to_parquet(temporary)
            with atomic_path(output.with_suffix(".html")) as temporary:
                temporary.write_text(page(title, sections, figures, libraries.result()), encoding="utf-8")
    with atomic_path(output) as temporary:
        temporary.write_text(markdown(title, sections, figures), encoding="utf-8")
    print(f"wrote {output} and {output.with_suffix('.html').name}", file=sys.stderr)


@contextmanager
def _drawing(pool: ProcessPoolExecutor, folder: Path) -> Iterator[Callable[[Section], None]]:
    """Gives what draws the figures of a section in the pool's processes, and waits for all at the end of the statement.

    There is a folder for each kind of figure, an empty one too, since Snakemake expects it.
    """
    with ExitStack() as stack:
        folders = {kind: stack.enter_context(atomic_path(folder / kind)) for kind in titles()}
        for temporary in folders.values():
            temporary.mkdir(parents=True)
        jobs = []

        def draw(section: Section) -> None:
            figures = [part for part in section.parts if isinstance(part, Figure)]
            jobs.extend(pool.submit(images.save, figure, folders[figure.kind]) for figure in figures)

        yield draw
        for job in tqdm(jobs, desc="drawing", unit="figure"):
            job.result()


def _write_tables(sections: list[Section], folder: Path) -> None:
    """ValueError if the folder has something else than tables, which would be lost."""
    there = [path.name for path in folder.glob("[!.]*")]  # Snakemake puts a hidden time stamp there
    if others := [name for name in there if not name.endswith((".csv", ".tex"))]:
        raise ValueError(f"{folder} has files that are not of a report: {', '.join(others)}; choose another --output")
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for part in [part for section in sections for part in section.parts if isinstance(part, Table)]:
            (temporary / f"{part.name}.csv").write_text(table.csv(part), encoding="utf-8")
            (temporary / f"{part.name}.tex").write_text(table.latex(part), encoding="utf-8")


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

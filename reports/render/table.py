"""A table as Markdown, CSV and LaTeX. The page's template writes HTML itself (page.html.j2)."""

from __future__ import annotations

import re

import pandas as pd

from reports.document import Entry, Table


def markdown(table: Table) -> str:
    """A pipe table with its note below it. Padded, so that a terminal shows it too."""
    rows = [[_markdown_entry(entry) for entry in row] for row in table.rows]
    frame = pd.DataFrame(rows, columns=table.columns)
    numbers = numeric_columns(table)
    align = ["right" if i in numbers else "left" for i in range(len(table.columns))]
    text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    return text + (f"\n\n{table.note}" if table.note else "")


def csv(table: Table) -> str:
    """Plain values in full precision; an entry's words, errors or intervals, and marks are in further columns."""
    columns: dict[str, list] = {}
    numbers = numeric_columns(table)
    for i, name in enumerate(table.columns):
        entries = [row[i] for row in table.rows]
        columns[name] = [entry.text if entry.value is None else entry.value for entry in entries]
        if i in numbers and any(re.search(r"[a-z]|\d, \d", entry.text) for entry in entries):
            columns[f"{name} text"] = [entry.text for entry in entries]
        for part in ("detail", "mark"):
            if any(getattr(entry, part) for entry in entries):
                columns[f"{name} {part}"] = [getattr(entry, part) for entry in entries]
    return pd.DataFrame(columns).to_csv(index=False)


def latex(table: Table) -> str:
    """A booktabs tabular, best values in bold; for `\\input` in a paper that loads booktabs."""
    rows = [[_latex_entry(entry) for entry in row] for row in table.rows]
    frame = pd.DataFrame(rows, columns=[_escape(name) for name in table.columns])
    numbers = numeric_columns(table)
    align = "".join("r" if i in numbers else "l" for i in range(len(table.columns)))
    return frame.to_latex(index=False, escape=False, column_format=align)


def numeric_columns(table: Table) -> set[int]:
    """The columns that have numbers: they are set flush right and sorted by value."""
    values = {i: [row[i].value for row in table.rows] for i in range(len(table.columns))}
    with_words = {i for i, column in values.items() if any(isinstance(value, str) for value in column)}
    return {i for i, column in values.items() if any(value is not None for value in column)} - with_words


def _markdown_entry(entry: Entry) -> str:
    text = f"**{entry.text}**" if entry.mark == "best" else entry.text
    return _join(text, entry.detail, "≈" if entry.mark == "tie" else "").replace("|", "\\|")


def _latex_entry(entry: Entry) -> str:
    text = _escape(entry.text)
    text = rf"\textbf{{{text}}}" if entry.mark == "best" else text
    return _join(text, _escape(entry.detail), r"$\approx$" if entry.mark == "tie" else "")


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _escape(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    for sign, command in {
        "±": r"$\pm$",
        "†": r"$\dagger$",
        "≈": r"$\approx$",
        "→": r"$\to$",
        "~": r"\textasciitilde ",
        "^": r"\textasciicircum ",
    }.items():
        text = text.replace(sign, command)
    return text

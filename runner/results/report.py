"""`--report`: the tables of all runs and what can be concluded from them, as text and as files by their suffix."""

import sys
import textwrap
from functools import partial
from pathlib import Path

import pandas as pd

from runner.files import write_bytes
from runner.results.records import read_records
from runner.results.summary import NOTE, summarize
from runner.wording import markdown_table, plain, shown


def print_report(run_options):
    """Print the report of folders of records, and write the files that are asked for. Raises UserError or OSError."""
    records, problems = read_records(run_options.report or [run_options.results])
    for problem in problems:
        print(shown(problem), file=sys.stderr)
    summary = summarize(records)
    print(as_text(summary))
    for path in run_options.write:
        suffix = Path(path).suffix
        if suffix in (".png", ".pdf", ".svg"):
            from runner.results.pictures import plot_summary  # slow to import, as is the page

            plot_summary(path, summary)
        elif suffix == ".html":
            from runner.results.page import render

            write_bytes(path, render(summary).encode())
        else:
            text = {".md": as_text, ".csv": as_csv, ".tex": as_tex}[suffix](summary)
            write_bytes(path, f"{text.rstrip()}\n".encode())
        print(f"Written: {path}")


def as_text(summary):
    """The report in lines of 100 columns, which are Markdown too."""
    parts = [wrapped(NOTE)] if summary.tables else ["There are no runs."]
    for table in summary.tables:
        cells = narrow_cells(table)
        lines = "\n".join(markdown_table(cells.columns, cells.values.tolist()))
        parts += [f"## {plain(table.title)}", lines, wrapped(table.note)]
        if answers := table.answers.items():
            answers = [f"- {asked.rows}: {asked.asks} Row {asked.b}: {a.sentence} {asked.why}" for asked, a in answers]
            parts += ["### Conclusions", wrapped(*answers)]
    parts.append(wrapped(*(f"- {remark}" for remark in summary.remarks)))
    return "\n\n".join(filter(None, parts))


def wrapped(*lines):
    """Lines, whatever is in them, as a text of at most 100 columns."""
    indents = ["  " * line.startswith("- ") for line in lines]
    fill = partial(textwrap.fill, width=100, break_on_hyphens=False)
    return "\n".join(fill(plain(line), subsequent_indent=indent) for line, indent in zip(lines, indents))


def narrow_cells(table):
    """The cells of a Table that fit 100 columns; the configuration, which may be long, is the last."""
    cells = table.cells.drop(columns=["Validation", "Training", "Minutes", "Features"], errors="ignore")
    return cells.assign(Configuration=cells.pop("Configuration"))


def as_csv(summary):
    """A line for each run that counts, with the fields of its file in flat columns."""
    runs = pd.json_normalize([record.to_dict() for record in summary.records])
    return runs.drop(columns=runs.filter(regex="^(confusions|history|options|repeats|texts)")).to_csv(index=False)


def as_tex(summary):
    """A table for a paper, for the package booktabs, for each that the report has."""
    tables = [narrow_cells(table).map(shown) for table in summary.tables]
    return "\n".join(cells.to_latex(index=False, escape=True) for cells in tables)

"""`--report`: the table of all runs and what can be concluded from it, as text and as files by their suffix."""

import sys
import textwrap
from pathlib import Path

import pandas as pd

from runner.data.datasets import SPLITS
from runner.files import write_bytes
from runner.results.comparison import P_DECIDES
from runner.results.records import read_records
from runner.results.summary import summarize
from runner.rows import ROWS
from runner.wording import describe_settings, markdown_table, plain, shown


def print_report(run_options):
    """Print the report of folders of records, and write the files that are asked for. Raises UserError or OSError."""
    records, problems = read_records(run_options.report or [run_options.results])
    for problem in problems:
        print(shown(problem), file=sys.stderr)
    summary = summarize(records)
    print(as_text(summary))
    for path in run_options.write:
        write_report(path, summary)
        print(f"Written: {path}")


def write_report(path, summary):
    """Write a Summary as the suffix of `path` says. Raises OSError."""
    suffix = Path(path).suffix
    if suffix in (".png", ".pdf", ".svg"):
        from runner.results.pictures import plot_summary  # slow to import, as is the page

        plot_summary(path, summary)
    elif suffix == ".html":
        from runner.results.page import render

        write_bytes(path, render(summary).encode())
    else:
        as_file = {".md": as_text, ".csv": as_csv, ".tex": as_tex}[suffix]
        write_bytes(path, f"{as_file(summary)}\n".encode())


# --- text ---


NOTE = (
    "Test: accuracy in percent, of n runs the mean, with its 95% interval, which holds the choice of messages and of "
    "seeds. Unseen: without the messages that are, but for case, digits and punctuation, among the training messages. "
    f"Conclusions: rows are compared message by message. {P_DECIDES}"
)


def as_text(summary):
    """The report in lines of 100 columns, which are Markdown too."""
    parts = [wrapped([NOTE])] if summary.groups else [["There are no runs."]]
    for table in summary.tables:
        parts += [[f"## Rows with {table.title}" if table.title else "## The table"], table_lines(table.groups, table)]
        parts += [wrapped([" ".join(table.below)]), *answer_parts(table)]
    if summary.others:
        parts += [["## Other runs"], table_lines(summary.others)]
    parts.append(wrapped(f"- {plain(remark)}" for remark in summary.remarks))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def wrapped(lines):
    """Lines of at most 100 columns."""
    indents = [(line, "  " * line.startswith("- ")) for line in lines]
    wrap = [textwrap.wrap(line, 100, subsequent_indent=i, break_on_hyphens=False) for line, i in indents]
    return sum(wrap, [])


def table_cells(groups, table=None):
    """The cells of a line for each Group, {title: text}, of a Table or of other runs."""
    lines = []
    for group in groups:
        line = dict(Row=group.name) if table else {}
        line |= dict(n=len(group.records), Test=group.in_full, Unseen=f"{100 * group.mean('unseen').fraction:.2f}")
        if any(other.macro_f1 for other in groups):
            line["Macro F1"] = group.macro_f1
        if table and not table.title:
            published = ROWS[group.numbers[0]].test
            line["Published"] = f"{published:.2f} {group.where(published)}"
        lines.append(line | (dict(Options=describe_settings(group.options)) if table else dict(Run=group.title)))
    return lines


def table_lines(groups, table=None):
    """The same as lines."""
    lines = table_cells(groups, table)
    return markdown_table(lines[0], [line.values() for line in lines])


def answer_parts(table):
    """Which questions were answered, and which were not, and why: lists of lines."""
    lines = []
    for answer in table.answers:
        if answer.comparison:
            a, b = answer.question.a, answer.question.b
            published = "" if table.title else f" Published: {ROWS[b].test - ROWS[a].test:+.2f}."
            lines.append(f"- {a}–{b}: {answer.question.asks} {plain(answer.sentence)}{published} {answer.question.why}")
    return [["### Conclusions"] * bool(lines), wrapped(lines), wrapped(table.not_compared)]


# --- files ---


def as_csv(summary):
    """A line for each run that counts, with flat columns."""
    lines = []
    for record in summary.records:
        line = {name: value for name, value in vars(record).items() if isinstance(value, str | int | float | None)}
        for split in (*SPLITS, "unseen"):
            line |= {f"{split}_{name}": value for name, value in vars(getattr(record, split)).items()}
        lines.append(record.settings | line | dict(test_macro_f1=record.confusions["test"].macro_f1))
    return pd.DataFrame(lines).to_csv(index=False).rstrip()


def as_tex(summary):
    """A table for a paper, for the package booktabs, for each that the report has."""
    found = [table_cells(table.groups, table) for table in summary.tables]
    found += [table_cells(summary.others)] if summary.others else []
    frames = [pd.DataFrame(lines).map(lambda cell: shown(str(cell))) for lines in found]
    return "\n".join(frame.to_latex(index=False, escape=True) for frame in frames)

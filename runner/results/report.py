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
    parts = [wrapped(NOTE)] if summary.groups else ["There are no runs."]
    for table in summary.tables:
        title = f"## Rows with {plain(table.title)}" if table.title else "## The table"
        parts += [title, table_text(table.groups), wrapped(table.below)]
        if answers := [f"- {question.rows}: {answer_text(table, question)}" for question in table.answers]:
            parts += ["### Conclusions", wrapped(*answers)]
        parts.append(
            wrapped(*(f"Not compared ({why}): {', '.join(rows)}." for why, rows in table.not_compared.items()))
        )
    if summary.others:
        parts += ["## Other runs", table_text(summary.others, False)]
    parts.append(wrapped(*(f"- {remark}" for remark in summary.remarks)))
    return "\n\n".join(filter(None, parts))


def wrapped(*lines):
    """Lines, whatever is in them, as a text of at most 100 columns."""
    wrapper = textwrap.TextWrapper(100, break_on_hyphens=False)
    texts = []
    for line in lines:
        wrapper.subsequent_indent = "  " * line.startswith("- ")
        texts.append(wrapper.fill(plain(line)))
    return "\n".join(texts)


def answer_text(table, question):
    """A Question with its answer and what explains it."""
    published = "" if table.title else f" Published: {question.published:+.2f}."
    return f"{question.asks} Row {question.b}: {table.answers[question].sentence}{published} {question.why}"


def table_cells(groups, is_table=True):
    """The cells of a line for each Group, {title: text}, of a table of rows or of other runs."""
    lines, has_f1 = [], any(group.macro_f1 for group in groups)
    for group in groups:
        line = dict(Row=group.name) if is_table else {}
        line |= dict(n=len(group.records), Test=group.in_full, Unseen=f"{100 * group.mean('unseen').fraction:.2f}")
        line |= {"Macro F1": group.macro_f1} if has_f1 else {}
        if group.published is not None:
            line["Published"] = f"{group.published:.2f} {group.where}"
        lines.append(line | (dict(Options=describe_settings(group.options)) if is_table else dict(Run=group.title)))
    return lines


def table_text(*groups_and_kind):
    """The same as a text."""
    cells = table_cells(*groups_and_kind)
    return "\n".join(markdown_table(cells[0], [line.values() for line in cells]))


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
    found = [table_cells(table.groups) for table in summary.tables]
    found += [table_cells(summary.others, False)] if summary.others else []
    frames = [pd.DataFrame(lines).map(lambda cell: shown(str(cell))) for lines in found]
    return "\n".join(frame.to_latex(index=False, escape=True) for frame in frames)

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
        WRITERS[Path(path).suffix](path, summary)
        print(f"Written: {path}")


# --- text ---


NOTE = (
    "Test: accuracy in percent, of n runs the mean, with its 95% interval, which holds the choice of messages and of "
    "seeds. Unseen: without the messages that are, but for case, digits and punctuation, among the training messages. "
    f"Conclusions: rows are compared message by message. {P_DECIDES}"
)


def as_text(summary):
    """The report in lines of 100 columns, which are Markdown too."""
    lines = [*wrapped([NOTE]), ""] if summary.records else ["There are no runs."]
    for table in summary.tables:
        lines += [f"## Rows with {table.title}" if table.title else "## The table", ""]
        lines += table_lines(table.groups, is_published=not table.title)
        lines += ["", *wrapped([table.below]), ""]
        lines += answer_lines(table)
    if summary.others:
        lines += ["## Other runs", "", *table_lines(summary.others, is_other=True), ""]
    lines += wrapped(f"- {plain(remark)}" for remark in summary.remarks)
    return "\n".join(lines).rstrip()


def wrapped(lines):
    """Lines of at most 100 columns."""
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, 100, subsequent_indent="  " * line.startswith("- "), break_on_hyphens=False)
    ]


def table_lines(groups, is_published=False, is_other=False):
    """The lines of a table of Groups; published figures are shown with the published table."""
    lines = []
    for group in groups:
        line = dict(n=len(group.records), Test=group.in_full(), Unseen=f"{100 * group.mean('unseen').fraction:.2f}")
        if any(other.macro_f1 is not None for other in groups):
            line["Macro F1"] = "" if group.macro_f1 is None else f"{group.macro_f1:.3f}"
        if is_published:
            published = ROWS[group.numbers[0]].test
            line["Published"] = f"{published:.2f} {group.where(published)}"
        if is_other:
            lines.append(line | dict(Run=group.name))
        else:
            lines.append(dict(Row=group.name) | line | dict(Options=describe_settings(group.options)))
    return markdown_table(list(lines[0]), [line.values() for line in lines])


def answer_lines(table):
    """The questions that were answered, and which were not, and why."""
    lines = []
    for answer in table.answers:
        if answer.comparison:
            a, b = answer.question.a, answer.question.b
            published = "" if table.title else f" Published: {ROWS[b].test - ROWS[a].test:+.2f}."
            lines.append(f"- {a}–{b}: {answer.question.asks} {plain(answer.sentence)}{published} {answer.question.why}")
    lines = ["### Conclusions", "", *wrapped(lines), ""] if lines else []
    return [*lines, *wrapped(f"Not compared ({why}): {pairs}." for why, pairs in table.not_compared.items()), ""]


# --- files ---


def write_text(path, summary):
    """`.md`: what is printed."""
    write_bytes(path, f"{as_text(summary)}\n".encode())


def write_csv(path, summary):
    """`.csv`: a line for each run that counts, with flat columns."""
    lines = []
    for record in summary.records:
        flat = {name: value for name, value in vars(record).items() if isinstance(value, str | int | float | None)}
        line = record.settings | flat
        for split in (*SPLITS, "unseen"):
            line |= {f"{split}_{name}": value for name, value in vars(getattr(record, split)).items()}
        line["test_macro_f1"] = record.confusions["test"].macro_f1
        # Text that begins with one of these is a formula to a spreadsheet; after an apostrophe it is text.
        is_formula = {name for name, value in line.items() if str(value).startswith(("=", "+", "-", "@"))}
        lines.append({n: f"'{v}" if n in is_formula and isinstance(v, str) else v for n, v in line.items()})
    write_bytes(path, pd.DataFrame(lines).to_csv(index=False).encode())


def write_tex(path, summary):
    """`.tex`: a table for a paper, for the package booktabs."""
    lines = [
        dict(Row=group.name, Options=describe_settings(group.options), n=len(group.records), Test=group.in_full())
        | dict(Published="" if table.title else f"{ROWS[group.numbers[0]].test:.2f}", Table=table.title)
        for table in summary.tables
        for group in table.groups
    ]
    lines += [dict(Row="", Options=group.name, n=len(group.records), Test=group.in_full()) for group in summary.others]
    frame = pd.DataFrame(lines).fillna("").map(lambda value: shown(str(value)))
    write_bytes(path, frame.to_latex(index=False, escape=True).encode())


def write_page(path, summary):
    """`.html`: the page."""
    from runner.results.page import render

    write_bytes(path, render(summary).encode())


def write_picture(path, summary):
    """`.png`, `.pdf`, `.svg`: the picture."""
    from runner.results.pictures import plot_summary

    plot_summary(path, summary)


WRITERS = {".md": write_text, ".csv": write_csv, ".tex": write_tex, ".html": write_page}
WRITERS |= dict.fromkeys((".png", ".pdf", ".svg"), write_picture)

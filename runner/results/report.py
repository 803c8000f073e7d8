"""`--report`: the table of all runs in a results file, and what can be concluded from it, as text."""

import sys
import textwrap
from dataclasses import replace
from pathlib import Path

from runner.data.datasets import SPLITS
from runner.files import UserError
from runner.results.page import write_page
from runner.results.pictures import plot_report
from runner.results.results_file import read_records
from runner.results.summary import answer_questions, arrange, in_precision, options_in, rank
from runner.results.table import command_line, markdown_header, markdown_line, plain
from runner.results.wording import against_published, describe, in_ranges, minutes_cell, unanswered, where


def print_report(run_options, rows, defaults, questions):
    """Print the report of a results file, and write its page and its picture, if they are asked for.

    `rows` maps the number of each row to its Row, `defaults` are those of the settings. Raises UserError or OSError.
    """
    records = []
    for path in files_of(run_options.report):
        try:
            found, damaged = read_records(path)
        except UserError:
            if path == run_options.report:
                raise
            continue  # somebody else's, which only has such a name
        records += found
        if damaged:
            numbers = ", ".join(map(str, damaged[:10]))
            numbers += f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
            print(f"{path}: no complete record on line {numbers}; skipped", file=sys.stderr)
    standing = arrange(records, rows, defaults)
    answers = answer_questions(standing, questions)
    print("\n".join(lines_of(standing, answers, rows, is_compact=sys.stdout.isatty())))
    if path := run_options.report_page:
        write_page(path, standing, answers, rows)
    if path := run_options.report_plot:
        plot_report(path, standing, rows)


def files_of(path):
    """A results file, and those that `append_record` wrote beside it because its columns are others."""
    path, found = Path(path), [path]
    while (beside := path.with_name(f"{path.stem}-{len(found) + 1}{path.suffix}")).exists():
        found.append(beside)
    return found


def lines_of(standing, answers, rows, is_compact):
    """The report, line by line: compact for a terminal of 100 columns, else in Markdown with all figures."""
    lines = []
    for table in (standing.table, *standing.variants):
        if table.title:
            lines += ["", f"The rows with {table.title}:" if is_compact else f"**The rows with {table.title}**", ""]
        if table.groups:
            lines += (compact_table if is_compact else markdown_table)(table, rows)
        if missing := [number for number in rows if table.group(number) is None]:
            lines += ["", f"Not run: rows {in_ranges(missing)}."]
        if ours := [answer for answer in answers if answer.table is table]:
            lines += ["", *comparison_lines(ours, rows, is_compact)]
    if standing.others:
        lines += ["", *(compact_others if is_compact else markdown_others)(standing.others)]
    lines += ["", *NOTES[is_compact]]
    if standing.disagreements:
        disagreements = list(map(plain, standing.disagreements))
        lines += ["", *(wrapped(disagreements) if is_compact else disagreements)]
    return lines[1:] if lines[0] == "" else lines


NOTES = {
    True: [
        "Test accuracy in percent with its 95% interval, which speaks of the choice of messages; of n seeds",
        "the mean. Published: the figure, and whether it is inside the interval.",
    ],
    False: [
        "Measured accuracy (of several runs mean ± standard deviation) with its 95% interval; then the published",
        "figure, the difference in points, and whether the published figure lies inside the interval. Times: minutes",
        "measured; published, on an A100. A seed counts once, however often and on whatever devices it was run.",
    ],
}


def options_text(table, number, group, rows):
    """What a row's options are in this table: as of the command line, or those of another row."""
    if (first := table.first_with(group)) != number:
        return f"as row {first}"
    return command_line(options_in(table, rows[number])) or "-"


# --- on a terminal ---


def fitted(text, width):
    """A text cut to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"


def wrapped(lines):
    """Lines of at most 100 columns."""
    return [part for line in lines for part in textwrap.wrap(line, 100, subsequent_indent="  ") or [""]]


def compact_table(table, rows):
    """Lines of at most 100 columns for the groups of a table."""
    lines = [
        f"{'row':>9}  {'options':<46}{'n':>3}  {'test accuracy':<21}{'published' if not table.title else ''}".rstrip()
    ]
    for (number, precision), group in sorted(table.groups.items(), key=rank):
        options = fitted(options_text(table, number, group, rows), 44)
        line = f"{f'{number}{in_precision(precision)}':>9}  {options:<46}{compact_figures(group)}"
        if not table.title:
            line += f"{rows[number].test:6.2f} {where(group.mean(), rows[number].test)}"
        lines.append(line.rstrip())
    return lines


def compact_figures(group):
    """Runs, and test accuracy with its interval, in fixed columns."""
    mean = group.mean()
    return f"{len(group.records):>3}  {100 * mean.fraction:6.2f} [{mean.bounds}]".ljust(26)


def compact_others(groups):
    """Lines of at most 100 columns for other runs."""
    lines = [f"{'other runs':<57}{'n':>3}  test accuracy"]
    return lines + [f"{fitted(plain(group.name), 55):<57}{compact_figures(group)}".rstrip() for group in groups]


# --- in Markdown ---


def measured(group, split):
    """One cell: the mean of several runs, ± their standard deviation, and its interval."""
    mean = group.mean(split)
    deviation = f" ± {group.deviation(split):.2f}" if len(group.records) > 1 else ""
    return f"{mean}{deviation} [{mean.bounds}]"


TITLES = ["Runs", *(f"{title} acc" for title in SPLITS.values()), "Training time", "CPU/GPU"]


def markdown_table(table, rows):
    """The lines of a table; published figures stand in the published one only."""
    lines = markdown_header(["Row", "Options", *TITLES]).splitlines()
    for (number, precision), group in sorted(table.groups.items(), key=rank):
        cells, minutes = [measured(group, split) for split in SPLITS], minutes_cell(group)
        if not table.title:
            published = [getattr(rows[number], split) for split in SPLITS]
            means = [group.mean(split) for split in SPLITS]
            cells = [f"{c}; {against_published(m, p)}" for c, m, p in zip(cells, means, published, strict=True)]
            minutes += f"; {rows[number].minutes:.2f}"
        options = options_text(table, number, group, rows)
        first = [
            f"{number}{in_precision(precision)}",
            f"`{options}`" if options.startswith("--") else options,
            len(group.records),
        ]
        lines.append(markdown_line([*first, *cells, minutes, ", ".join(group.devices)]))
    return lines


def markdown_others(groups):
    """The lines of the table of other runs."""
    lines = markdown_header(["Other runs", *TITLES]).splitlines()
    for group in groups:
        cells = [measured(group, split) for split in SPLITS]
        name = group.name
        lines.append(markdown_line([name, len(group.records), *cells, minutes_cell(group), ", ".join(group.devices)]))
    return lines


# --- comparisons ---


def comparison_lines(answers, rows, is_compact):
    """The questions that were answered, and which were not, and why; on a terminal in lines of 100 columns."""
    lines = []
    for answer in answers:
        if answer.comparison:
            a, b = answer.question.a, answer.question.b
            published = "" if answer.table.title else f" (published {rows[b].test - rows[a].test:+.2f})"
            lines.append(
                f"- {a}–{b}: {answer.question.asks} {describe(replace(answer, remark=plain(answer.remark)))}{published}"
            )
    if lines:
        lines = [
            "Conclusions, on the same test messages. Verdicts and p-values hold for all comparisons of the report "
            "together (Holm), each interval for its own. Of two runs they speak of these two only, of several seeds of "
            "others too.",
            "",
            *lines,
            "",
        ]
    lines += [f"Not compared ({why}): {pairs}." for why, pairs in unanswered(answers).items()]
    return wrapped(lines) if is_compact else lines

"""Print finished runs: the row of one, in 140 columns; with `--report` the tables of all, and write them to files."""

import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from runner.data.datasets import SPLITS
from runner.files import write_bytes
from runner.results.comparison import describe_p
from runner.results.records import read_records
from runner.results.summary import summarize
from runner.rows import ROWS
from runner.wording import describe_settings, markdown_table, plain, printable, short_name

# --- the row of one run, with the columns of the public original's table ---

# Options that have a column of their own, batch size and accumulation steps one word in the column of the others.
SHOWN = {"model_size", "weights", "trainable_token_pos", "average_embeddings", "trainable_layers", "lora_rank"}
SHOWN |= {"lora_alpha", "context_length", "no_padding", "batch_size", "accumulation_steps"}


def print_row(records, console):
    """Print the row of one finished run, or the mean of several seeds, below the published figures if there are any."""
    if (number := records[0].row) is not None:
        row = ROWS[number]
        accuracies = f"training {row.train:.2f}%, validation {row.validation:.2f}%, test {row.test:.2f}%"
        console.info(f"\nPublished, row {number}: {accuracies}; {row.minutes:.2f} minutes on an A100")
    console.table_row(row_cells(records))


def row_cells(records):
    """Return the cells of a row by their titles; for several seeds, means ± standard deviations."""
    first = records[0]
    settings, n = first.settings, len(records)
    layers, position = settings["trainable_layers"], settings["trainable_token_pos"]
    if layers.startswith("lora"):
        layers += f" {settings['lora_rank']}/{settings['lora_alpha']:g}"
    if settings["average_embeddings"]:
        position = "mean of all" if position == "last" and not settings["no_padding"] else "mean of real"
    others = []
    if first.options.keys() & {"batch_size", "accumulation_steps"}:
        others.append(f"batch {settings['batch_size']}×{settings['accumulation_steps']}")
    others += [describe_settings({name: value}) for name, value in first.options.items() if name not in SHOWN]
    others += [first.precision] * (first.precision != "fp32")
    others += [f"seed {first.seed}"] * (first.seed != 123 and n == 1)
    row = {
        "Row": f"{first.row or '-'}" + f", n={n}" * (n > 1),
        "Model": short_name(settings["model_size"]),
        "Weights": first.options.get("weights", "pretrained"),
        "Position": position,
        "Trained": layers,
        "Context": "unpadded" if settings["no_padding"] else str(first.tokens_per_message),
        "Other options": ", ".join(others) or "-",
    }
    titles = ("Train acc", "Val acc", "Test ± SD of seeds" if n > 1 else "Test acc")
    for title, split in zip(titles, SPLITS, strict=True):
        percentages = [100 * getattr(record, split).fraction for record in records]
        mean, deviation = np.mean(percentages), f"±{np.std(percentages, ddof=1):.1f}" if n > 1 else "%"
        row[title] = "n/a" if np.isnan(mean) else f"{mean:.2f}{deviation}"  # no labels
    minutes = np.mean([record.minutes for record in records])
    return row | {"Minutes": f"{minutes:.2f}", "CPU/GPU": first.device_name.removeprefix("NVIDIA ")}


# --- the report of all runs ---


def print_report(run_options):
    """Print the report of folders of records, and write the files that are asked for. Raises UserError or OSError."""
    records, problems = read_records(run_options.report or [run_options.results])
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    summary = summarize(records)
    print(as_text(summary))
    for path in run_options.write:
        for written in write_report(Path(path), summary):
            print(f"Written: {written}")


def write_report(path, summary):
    """Write the report in the format of a suffix; return the paths of its files. Raises OSError."""
    if path.suffix in (".png", ".pdf", ".svg"):
        from runner.results.pictures import plot_summary  # slow to import, as is the page

        plot_summary(path, summary)
        return [path]
    texts = {path: ""}
    if path.suffix == ".html":
        from runner.results.page import render

        texts[path] = render(summary)
    elif path.suffix == ".csv":
        texts = {path: runs_as_csv(summary)}
        texts[path.with_stem(f"{path.stem}-conclusions")] = conclusions(summary.tables).to_csv(index=False)
    else:
        texts[path] = as_text(summary) if path.suffix == ".md" else as_tex(summary)
    for name, text in texts.items():
        write_bytes(name, f"{text.rstrip()}\n".encode(errors="backslashreplace"))  # a note need not be UTF-8
    return list(texts)


def as_text(summary):
    """Return the report in lines of 100 columns, which are Markdown too."""
    parts = [wrapped(summary.note)]
    for table in summary.tables:
        cells = narrow_cells(table)
        lines = "\n".join(markdown_table(cells.columns, cells.values.tolist()))
        parts += [f"## {plain(table.title)}", lines, wrapped(table.note)]
        answers = [f"- {one.rows}: {one.asks} {one.sentence}" for one in table.answers]
        if table.remarks or answers:
            parts += ["### Conclusions", wrapped(*table.remarks), wrapped(*answers)]
    parts.append(wrapped(*(f"- {remark}" for remark in summary.remarks)))
    return "\n\n".join(filter(None, parts))


def wrapped(*lines):
    """Return lines, whatever is in them, as a text of at most 100 columns."""
    indents = ["  " * line.startswith("- ") for line in lines]
    fill = partial(textwrap.fill, width=100, break_on_hyphens=False)
    return "\n".join(fill(plain(line), subsequent_indent=indent) for line, indent in zip(lines, indents))


def narrow_cells(table):
    """Return the cells of a Table that fit 100 columns; the configuration, which may be long, is the last."""
    cells = table.cells.drop(columns=["Training", "Minutes", "Features"]).rename(columns={"Validation": "Val."})
    return cells.assign(Configuration=cells.pop("Configuration"))


def conclusions(tables):
    """Return the answers of Tables as a DataFrame; differences are in points."""
    rows = []
    for table in tables:
        for numbers, asks, subject, found, _ in table.answers:
            points = [100 * value for value in (found.difference, *found.interval)]
            rows.append([table.title, numbers, asks, subject, found.verdict, *points, found.p, found.basis])
    titles = ("table", "rows", "question", "subject", "verdict", "difference", "low", "high", "p", "basis")
    return pd.DataFrame(rows, columns=titles)


def runs_as_csv(summary):
    """Return a line for each run of a Summary, with the fields of its file in flat columns."""
    runs = pd.json_normalize([record.to_dict() for record in summary.records]).convert_dtypes()  # 123 stays 123
    for split in (*SPLITS, "unseen") if len(runs) else ():
        name = f"{split}.correct"
        runs[name] = runs[name].astype(object).where(runs[f"{split}.total"] > 0, "n/a")
    return runs.drop(columns=runs.filter(regex="^(confusions|history|options|duplicates|texts)")).to_csv(index=False)


def as_tex(summary):
    """Return the tables and their conclusions in LaTeX, no wider than the text of an article."""
    parts = ["% Needs \\usepackage{array,booktabs}."]
    for table in summary.tables:
        cells = narrow_cells(table).drop(columns="Val.").map(printable)
        parts.append(tabular(cells, dict(Configuration=0.26)))
        answers = conclusions([table])
        if len(answers):
            ends = [f"{low:.1f} to {high:.1f}" for low, high in zip(answers.low, answers.high)]
            p_values = ["" if pd.isna(p) else describe_p(p).removeprefix("p ").removeprefix("= ") for p in answers.p]
            cells = dict(Rows=answers.rows, Question=answers.question.map(printable), Verdict=answers.verdict)
            cells |= {"Points": answers.difference.map("{:+.2f}".format), "95% interval": ends, "p": p_values}
            parts.append(tabular(pd.DataFrame(cells), dict(Question=0.32, Verdict=0.17)))
    return "\n".join(parts)


def tabular(cells, widths):
    """Return a DataFrame as LaTeX: columns of text by their widths in parts of \\textwidth, numbers to the right."""
    left = "".join(
        rf">{{\raggedright\arraybackslash}}p{{{widths[c]}\textwidth}}" if c in widths else "r" for c in cells
    )
    body = cells.to_latex(index=False, escape=True, column_format=f"@{{}}{left}@{{}}")
    return f"{{\\footnotesize\\setlength{{\\tabcolsep}}{{4pt}}\n{body}}}\n"

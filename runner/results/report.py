"""What is printed of finished runs: the row of one, in 140 columns; `--report`, the tables of all, in files too."""

import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from runner.data.datasets import SPLITS
from runner.files import write_bytes
from runner.results.records import read_records
from runner.results.summary import NOTE, summarize
from runner.rows import ROWS
from runner.wording import describe_settings, markdown_table, plain, shown

# --- the row of one run, with the columns of the public original's table ---

# Options that have words of their own in a column; others stand beside the context length.
SHOWN = {"model_size", "weights", "trainable_token_pos", "average_embeddings", "trainable_layers", "lora_rank"}
SHOWN |= {"lora_alpha", "context_length", "no_padding", "batch_size", "accumulation_steps"}


def print_row(records, console):
    """Print the row of one finished run, or of several seeds their mean; above it the published figures, if any."""
    if (number := records[0].row) is not None:
        row = ROWS[number]
        accuracies = f"training {row.train:.2f}%, validation {row.validation:.2f}%, test {row.test:.2f}%"
        console.info(f"\nPublished, row {number}: {accuracies}; {row.minutes:.2f} minutes on an A100")
    console.table_row(row_cells(records))


def row_cells(records):
    """The cells of a row by their titles; of several seeds means ± standard deviations."""
    first = records[0]
    settings, n = first.settings, len(records)
    layers, position = settings["trainable_layers"], settings["trainable_token_pos"]
    if layers.startswith("lora"):
        layers += f" {settings['lora_rank']}/{settings['lora_alpha']:g}"
    if settings["average_embeddings"]:
        position = "mean of all" if position == "last" and not settings["no_padding"] else "mean of real"
    context = ["unpadded" if settings["no_padding"] else str(first.tokens_per_message)]
    if first.options.keys() & {"batch_size", "accumulation_steps"}:
        context.append(f"batch {settings['batch_size']}×{settings['accumulation_steps']}")
    context += [describe_settings({name: value}) for name, value in first.options.items() if name not in SHOWN]
    context += [first.precision] * (first.precision != "fp32")
    context += [f"seed {first.seed}"] * (first.seed != 123 and n == 1)
    row = {
        "Row": f"{first.row or '-'}" + f", n={n}" * (n > 1),
        "Model": settings["model_size"].split(" ")[0],
        "Weights": first.options.get("weights", "pretrained"),
        "Token position": position,
        "Trained layers": layers,
        "Context length": ", ".join(context),
    }
    for title, split in zip(("Train", "Val", "Test"), SPLITS, strict=True):
        percentages = [100 * getattr(record, split).fraction for record in records]
        mean, deviation = np.mean(percentages), f"±{np.std(percentages, ddof=1):.1f}" if n > 1 else "%"
        row[f"{title} acc"] = "n/a" if np.isnan(mean) else f"{mean:.2f}{deviation}"  # no labels
    minutes = np.mean([record.minutes for record in records])
    return row | {"Minutes": f"{minutes:.2f}", "CPU/GPU": first.device_name.removeprefix("NVIDIA ")}


# --- the report of all runs ---


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

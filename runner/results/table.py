"""The printed row of a run: the columns of the public original's table, in 140 columns."""

import numpy as np

from runner.data.datasets import SPLITS
from runner.rows import ROWS
from runner.wording import describe_settings

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

"""The printed row of a run: the columns of the public original's table, in 140 columns."""

import numpy as np

from runner.data.datasets import SPLITS
from runner.rows import ROWS
from runner.wording import describe_settings

# What is shown beside the context length, unless another column shows it.
REMARKS = ("disable_causal_mask", "num_epochs", "learning_rate", "weight_decay", "ignore_index", "dataset", "data")


def print_row(records, console):
    """Print the row of one finished run, or of several seeds their mean; above it the published figures, if any."""
    if (row := records[0].row) is not None:
        console.info(f"\nPublished, row {row}: {ROWS[row].published}")
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
    row = {
        "Row": f"{first.row or '-'}" + f", n={n}" * (n > 1),
        "Model": settings["model_size"].split(" ")[0],
        "Weights": first.options.get("weights", "pretrained"),
        "Token position": position,
        "Trained layers": layers,
        "Context length": "; ".join(filter(None, [context(first), remarks(first, n > 1)])),
    }
    for title, split in zip(("Train", "Val", "Test"), SPLITS, strict=True):
        percentages = [100 * getattr(record, split).fraction for record in records]
        mean, deviation = np.mean(percentages), f"±{np.std(percentages, ddof=1):.1f}" if n > 1 else "%"
        row[f"{title} acc"] = "n/a" if np.isnan(mean) else f"{mean:.2f}{deviation}"  # no labels
    minutes = np.mean([record.minutes for record in records])
    return row | {"Minutes": f"{minutes:.2f}", "CPU/GPU": first.device_name.removeprefix("NVIDIA ")}


def context(record):
    """Tokens of a message, to which it is padded, and the size of a batch."""
    settings = record.settings
    words = "unpadded" if settings["no_padding"] else str(record.tokens_per_message)
    if record.options.keys() & {"batch_size", "accumulation_steps"}:
        words += f", batch {settings['batch_size']}"
        words += f"×{settings['accumulation_steps']}" if settings["accumulation_steps"] > 1 else ""
    return words


def remarks(record, is_mean):
    """What the other columns do not show; the seed of a single run, unless it is the default."""
    words = [describe_settings({n: record.options[n]}) for n in REMARKS if n in record.options]
    words += [record.precision] * (record.precision != "fp32")
    return ", ".join(words + [f"seed {record.seed}"] * (record.seed != 123 and not is_mean))

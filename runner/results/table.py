"""The printed row of a run: the columns of the public original's table, in 140 columns."""

import math

from runner.data.datasets import SPLITS
from runner.results.accuracy import mean_and_deviation
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
    settings = first.settings
    layers, position = settings["trainable_layers"], settings["trainable_token_pos"]
    if layers.startswith("lora"):
        layers += f" {settings['lora_rank']}/{settings['lora_alpha']:g}"
    if settings["average_embeddings"]:
        position = "mean of all" if position == "last" and not settings["no_padding"] else "mean of real"
    accuracies = {split: [100 * getattr(record, split).fraction for record in records] for split in SPLITS}
    return {
        "Row": f"{first.row or '-'}{f', n={len(records)}' if len(records) > 1 else ''}",
        "Model": settings["model_size"].split(" ")[0],
        "Weights": first.options.get("weights", "pretrained"),
        "Token position": position,
        "Trained layers": layers,
        "Context length": "; ".join(filter(None, [context(first), remarks(first, len(records) > 1)])),
        "Train acc": mean_cell(accuracies["train"]),
        "Val acc": mean_cell(accuracies["validation"]),
        "Test acc": mean_cell(accuracies["test"]),
        "Minutes": f"{mean_and_deviation([record.minutes for record in records])[0]:.2f}",
        "CPU/GPU": first.device_name.removeprefix("NVIDIA "),
    }


def mean_cell(percentages):
    """`95.00%`, of several `95.33±0.6`."""
    mean, deviation = mean_and_deviation(percentages)
    if math.isnan(mean):  # no labels
        return "n/a"
    return f"{mean:.2f}%" if len(percentages) == 1 else f"{mean:.2f}±{deviation:.1f}"


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

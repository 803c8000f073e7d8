"""The table: its rows and their published figures, settings as text, and the printed row of a run."""

import re
from dataclasses import fields, replace

from runner.data.datasets import DATASET_NAMES, SPLITS
from runner.results.accuracy import mean_and_deviation, shown

# --- its rows ---

# Options that are free in a row: the row stays the same with any value of these.
FREE_OPTIONS = ("seed", "device", "precision", "features", "data_dir")


def row_number(experiment, data, weights, rows):
    """The number of the row of `rows` ({number: Row}) that a run is, from whatever file its weights came; or None."""
    if data.name != "uci":
        return None
    if weights.is_published:
        experiment = replace(experiment, weights="pretrained")
    for number, row in rows.items():
        free = {name: getattr(experiment, name) for name in FREE_OPTIONS}
        if experiment == type(experiment)(**row.options, **free):
            return number
    return None


def describe_configuration(experiment, data):
    """What differs from row 1, in words, whatever the seed and the machine; the user's own data are told apart."""
    options = changed_options(experiment)
    options = {name: value for name, value in options.items() if name not in FREE_OPTIONS}
    return describe_settings(options) + (f", own data {data.sha256[:8]}" if data.name == "own" else "")


# --- settings as text ---


def changed_options(experiment):
    """The options of an experiment that are not the default, {name: value}."""
    values = {setting.name: (getattr(experiment, setting.name), setting.default) for setting in fields(experiment)}
    return {name: value for name, (value, default) in values.items() if value != default}


# Settings whose value needs a label.
DESCRIPTIONS = {
    "trainable_token_pos": "{} token",
    "weights": "{} weights",
    "dataset": "{} data",
    "lora_rank": "rank {}",
    "lora_alpha": "alpha {:g}",
    "batch_size": "batch size {}",
    "accumulation_steps": "accumulation {}",
    "num_epochs": "{} epochs",
    "learning_rate": "learning rate {:g}",
    "weight_decay": "weight decay {:g}",
    "ignore_index": "ignore index {}",
    "context_length": "context: {}",
}


def describe_settings(settings):
    """Settings, {name: value}, as a reader would name them: `gpt2-xl (1558M), lora, rank 16`."""
    words = []
    for name, value in settings.items():
        words.append((name if value is True else DESCRIPTIONS.get(name, "{}").format(value)).replace("_", " "))
    return ", ".join(words) or "last block, last token"


def command_line(settings):
    """Settings, {name: value}, as command-line options."""
    words = []
    for name, value in settings.items():
        value = f"{value:g}" if isinstance(value, float) else f'"{value}"' if " " in str(value) else value
        words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


# --- the printed row ---


def markdown_line(cells):
    """A line of a Markdown table, whatever is in its cells."""
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"


def plain(text):
    """A text in one line that neither a terminal nor Markdown takes for more than text."""
    return shown(re.sub(r"[\r\n]+", " ", str(text))).replace("<", "&lt;")


def markdown_header(titles):
    """The two lines that stand above rows to make them a Markdown table."""
    return markdown_line(titles) + "\n" + markdown_line("---" for _ in titles)


def row_cells(record, rows, defaults):
    """The cells of a run's printed row by their titles. `defaults` are those of the settings, by name."""
    settings = record.settings
    layers, position = settings["trainable_layers"], settings["trainable_token_pos"]
    if layers.startswith("lora"):
        layers += f" (rank {settings['lora_rank']}, alpha {settings['lora_alpha']:g})"
    if settings["average_embeddings"]:
        position = "all tokens" if position == "last" and not settings["no_padding"] else "all real tokens"
    context = f"{record.tokens_per_message}{', no padding' if settings['no_padding'] else ''}"
    if settings["context_length"] == "longest_training_example":
        context = f"longest train ex. ({context})"
    return {
        "Row": record.row or "-",
        "Model": settings["model_size"],
        "Weights": settings["weights"],
        "Trainable token position": position,
        "Trainable layers": layers,
        "Context length": context,
        **{f"{title} acc": getattr(record, split) for split, title in SPLITS.items()},
        "Training time": f"{record.minutes:.2f} min",
        "CPU/GPU": record.device_name,
        "Remarks": remarks(record, defaults),
        "Published": rows[record.row].published if record.row else "-",
    }


# Settings that no column of the printed row shows, as remarks.
REMARKS = {
    "average_embeddings": "averaged outputs",
    "disable_causal_mask": "no causal mask",
    "batch_size": "batch size {}",
    "accumulation_steps": "accumulation {}",
    "num_epochs": "epochs {}",
    "learning_rate": "learning rate {:g}",
    "weight_decay": "weight decay {:g}",
    "ignore_index": "ignore index {}",
    "precision": "{}",
    "seed": "seed {}",
}


def remarks(record, defaults):
    """What the other columns of the printed row do not show."""
    different = [name for name in REMARKS if record.settings[name] != defaults[name]]
    texts = [REMARKS[name].format(record.settings[name]) for name in different]
    texts += [DATASET_NAMES[record.data]] if record.data != "uci" else []
    return ", ".join(texts) or "-"


def mean_row_cells(records, rows, defaults):
    """`row_cells` of several seeds: mean ± standard deviation of accuracies and minutes."""
    cells = row_cells(records[0], rows, defaults)
    for split, title in SPLITS.items():
        mean, deviation = mean_and_deviation([getattr(record, split).fraction * 100 for record in records])
        cells[f"{title} acc"] = f"{mean:.2f}% ± {deviation:.2f}"
    mean, deviation = mean_and_deviation([record.minutes for record in records])
    cells["Training time"] = f"{mean:.2f} ± {deviation:.2f} min"
    cells["Remarks"] = f"mean ± standard deviation of {len(records)} seeds"
    return cells

"""Settings and foreign texts in words, for a terminal, Markdown and the command line; it imports no other module."""

import re
from dataclasses import fields

# --- texts from files, which may hold anything ---


def shown(text):
    """A text in one line, in which what a terminal would obey or hide is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(text):
    """A text in one line that neither a terminal nor Markdown takes for more than text."""
    return shown(re.sub(r"[\r\n]+", " ", str(text))).replace("<", "&lt;")


# --- settings ---


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
    "lora_alpha": "alpha {}",
    "batch_size": "batch size {}",
    "accumulation_steps": "accumulation {}",
    "num_epochs": "{} epochs",
    "learning_rate": "lr {}",
    "weight_decay": "weight decay {}",
    "ignore_index": "ignore {}",
    "context_length": "context {}",
}
WORDS = {
    ("disable_causal_mask", True): "no causal mask",
    ("trainable_layers", "all"): "all layers",
    ("num_epochs", 1): "1 epoch",
    ("context_length", "model_context_length"): "context 1024",
}


def describe_settings(settings):
    """Settings, {name: value}, as a reader would name them: `gpt2-xl, lora, rank 16`; of none, what row 1 is."""
    words = []
    for name, value in settings.items():
        text = f"{value:g}" if isinstance(value, float) else str(value).split(" (")[0]  # of a size its name
        text = name if value is True else DESCRIPTIONS.get(name, "{}").format(text)
        words.append(WORDS.get((name, value), text.replace("_", " ")))
    return ", ".join(words) or "last block, last token"


def command_line(settings):
    """Settings, {name: value}, as command-line options."""
    words = []
    for name, value in settings.items():
        value = f"{value:g}" if isinstance(value, float) else f'"{value}"' if " " in str(value) else value
        words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


def in_ranges(numbers):
    """[1, 2, 3, 5] as `1–3, 5`."""
    parts = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in parts)


# --- Markdown ---


def markdown_line(cells):
    """A line of a Markdown table, whatever is in its cells."""
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"


def markdown_header(titles):
    """The two lines that stand above rows to make them a Markdown table."""
    return markdown_line(titles) + "\n" + markdown_line("---" for _ in titles)


def markdown_table(titles, rows):
    """The lines of a Markdown table whose columns, but for the last, are aligned on a terminal too."""
    cells = [[plain(cell).replace("|", "\\|") for cell in row] for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = len(titles[-1])
    cells.insert(1, ["-" * width for width in widths])
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return [f"| {' | '.join(line)} |" for line in lines]

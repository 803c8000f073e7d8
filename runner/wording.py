"""Settings and texts of users in words, for a terminal, Markdown and the command line; it imports no other module.

What is made here is for people to read. Nothing is ever looked up or told apart by it.
"""

import re
import shlex
from dataclasses import fields


def printable(text):
    """Return a text in one line, with escapes for characters that a terminal would interpret or hide."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(text):
    """Return a text in one line in which neither a terminal nor Markdown finds anything but text."""
    return re.sub(r"<(?=\S)", "&lt;", printable(re.sub(r"[\r\n]+", " ", str(text))))


def changed_options(experiment):
    """Return the options of an experiment that are not the default, {name: value}."""
    values = {setting.name: (getattr(experiment, setting.name), setting.default) for setting in fields(experiment)}
    return {name: value for name, (value, default) in values.items() if value != default}


# Words before and after the value of a setting.
BEFORE = dict(lora_rank="rank", lora_alpha="alpha", batch_size="batch size", accumulation_steps="accumulation")
BEFORE |= dict(learning_rate="lr", weight_decay="weight decay", ignore_index="ignore", context_length="context")
BEFORE |= dict(num_epochs="epochs")
AFTER = dict(trainable_token_pos="token", weights="weights", dataset="data")
WORDS = {"disable_causal_mask True": "no causal mask", "trainable_layers all": "all layers"}
WORDS |= {"context_length model_context_length": "context 1024"}


ROW_1 = dict(trainable_layers="last block", trainable_token_pos="last token")


def describe_settings(settings, of_table=()):
    """Return settings, {name: value}, in words: `gpt2-xl, lora, rank 16`.

    Without settings they are those of row 1, as far as the settings of its table, `of_table`, are not others.
    """
    words = []
    for name, value in settings.items():
        text = short_name(str(value)) if name == "model_size" else str(value).removesuffix(".0")
        text = name if value is True else f"{BEFORE.get(name, '')} {text} {AFTER.get(name, '')}".strip()
        words.append(WORDS.get(f"{name} {value}", text.replace("_", " ")))
    return ", ".join(words or [text for name, text in ROW_1.items() if name not in of_table])


def short_name(model_size):
    """Return `gpt2-xl` for `gpt2-xl (1558M)`."""
    return model_size.split(" ")[0]


def command_line(settings):
    """Return settings, {name: value}, as command-line options, model sizes by their short names."""
    words = []
    for name, value in settings.items():
        text = short_name(value).removeprefix("gpt2-") if name == "model_size" else str(value)
        words += [f"--{name}"] if value is True else [f"--{name}", quoted(text)]
    return " ".join(words)


def quoted(text):
    """Return a text as one word of a command line. Double quotes serve sh, cmd and PowerShell, if nothing expands."""
    if re.fullmatch(r"[\w./\\:+-]+", text):
        return text
    return shlex.quote(text) if re.search(r'["$`!]', text) else f'"{text}"'


def markdown_table(titles, rows, align=True):
    """Return the lines of a Markdown table of any texts; `align` pads all columns but the last, for a terminal."""
    cells = [[plain(cell).replace("|", "\\|") for cell in row] for row in (titles, *rows)]
    widths = [max(map(len, column)) if align else 0 for column in zip(*cells, strict=True)]
    widths[-1] = 0
    cells.insert(1, ["-" * width or "---" for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]

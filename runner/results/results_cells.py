"""A record as a line of the results file, and back: one text for each column."""

import re
from collections import Counter
from contextlib import suppress
from dataclasses import fields

from runner.data.datasets import SPLITS
from runner.results.accuracy import Accuracy, Confusion, Mistake
from runner.results.records import History, Record

ACCURACY_PARTS = ("correct", "total", "fraction")
DECIMALS = {"minutes": 4, "seconds": 2, "peak_memory_gb": 3}


def to_cells(record):
    """A Record's line of the file: {column: value}."""
    cells = {}
    for name, value in vars(record).items():
        if name == "settings":
            cells |= value
        elif isinstance(value, Accuracy):
            cells |= {f"{name}_{part}": getattr(value, part) for part in ACCURACY_PARTS}
        elif name == "confusions":
            for split in SPLITS:
                cells |= confusion_cells(split, value and value[split])
        elif name == "history":
            cells |= history_cells(value)
        else:
            cells[name] = round(value, DECIMALS[name]) if name in DECIMALS and value is not None else value
    return {column: one_line(value) if isinstance(value, str) else value for column, value in cells.items()}


# What a run keeps of its mistakes and losses, compactly: entries with spaces between them.

MAX_MISTAKES = 100_000  # of a split; of a run with more none are kept, and it takes part in no paired comparison


def confusion_cells(split, confusion):
    """Two cells: `9/151 6/149`, errors of each class, and `17:0>1:0.981`, number, label, class called, confidence."""
    if confusion is None or len(confusion.mistakes) > MAX_MISTAKES:
        return {f"{split}_errors": "", f"{split}_mistakes": ""}
    mistakes = [f"{m.number}:{m.label}>{m.called}:{m.confidence:.3f}" for m in confusion.mistakes]
    return {f"{split}_errors": errors_cell(confusion), f"{split}_mistakes": " ".join(mistakes)}


def errors_cell(confusion):
    """`9/151 6/149`, the errors of each class."""
    wrong = Counter(mistake.label for mistake in confusion.mistakes)
    return " ".join(f"{wrong[label]}/{total}" for label, total in enumerate(confusion.totals))


def confusion_from(cells, split):
    """The inverse of `confusion_cells`; None where there is nothing. Raises ValueError for what does not fit."""
    errors = re.findall(r"(\d+)/(\d+)(?: |$)", cells.get(f"{split}_errors", ""))
    if not errors:
        return None
    mistakes = []
    for entry in cells[f"{split}_mistakes"].replace(">", ":").split():
        number, label, called, confidence = entry.split(":")
        mistake = Mistake(int(number), int(label), int(called), float(confidence))
        if min(mistake.number, mistake.label, mistake.called) < 0 or max(mistake.label, mistake.called) >= len(errors):
            raise ValueError(f"{entry}, of {len(errors)} classes")
        mistakes.append(mistake)
    confusion = Confusion(tuple(int(total) for _, total in errors), tuple(mistakes))
    accuracy = accuracy_from(cells[f"{split}_correct"], cells[f"{split}_total"])
    if confusion.accuracy != accuracy or errors_cell(confusion) != cells[f"{split}_errors"]:
        raise ValueError(f"{len(mistakes)} mistakes, but {cells[f'{split}_errors']} and {accuracy.in_full}")
    return confusion


def history_cells(history):
    """Two cells: `50:0.617:0.637`, step and losses, and `35/40:36/40`, accuracies after each epoch; training first."""
    if history is None:
        return dict(losses="", epoch_accuracies="")
    losses = zip(history.steps, history.train_losses, history.val_losses, strict=True)
    accuracies = zip(history.train_accuracies, history.val_accuracies, strict=True)
    return dict(
        losses=" ".join(f"{step}:{train:.4g}:{val:.4g}" for step, train, val in losses),
        epoch_accuracies=" ".join(f"{t.correct}/{t.total}:{v.correct}/{v.total}" for t, v in accuracies),
    )


def history_from(cells):
    """The inverse of `history_cells`, without the lines; None where there is nothing. Raises ValueError."""
    losses = [entry.split(":") for entry in cells.get("losses", "").split()]
    if not losses:
        return None
    steps = [int(step) for step, _, _ in losses]
    if steps != sorted(set(steps)):
        raise ValueError("steps that do not grow")
    accuracies = [re.split("[:/]", entry) for entry in cells["epoch_accuracies"].split()]
    return History(
        steps=steps,
        train_losses=[float(train) for _, train, _ in losses],
        val_losses=[float(val) for _, _, val in losses],
        train_accuracies=[accuracy_from(correct, total) for correct, total, _, _ in accuracies],
        val_accuracies=[accuracy_from(correct, total) for _, _, correct, total in accuracies],
    )


# Text that begins with one of these is a formula to a spreadsheet; after an apostrophe it is text.
FORMULA = re.compile(r"'*[=+\-@]")


def one_line(text):
    """A text without line breaks, and such that no spreadsheet runs it."""
    text = re.sub(r"[\r\n\t]+", " ", text)
    return f"'{text}" if FORMULA.match(text) else text


def without_apostrophe(text):
    """The text of which `one_line` made a cell."""
    return text[1:] if text.startswith("'") and FORMULA.match(text[1:]) else text


MAX_MINUTES = 1e9  # two thousand years


def from_cells(cells):
    """The Record of a line, {column: text}. Raises ValueError."""
    texts = {field.name: without_apostrophe(cells.get(field.name, "")) for field in fields(Record)}
    minutes = float(cells["minutes"])
    if not 0 <= minutes < MAX_MINUTES:
        raise ValueError(f"{minutes} minutes")
    return Record(
        **texts
        | {split: accuracy_from(cells[f"{split}_correct"], cells[f"{split}_total"]) for split in SPLITS}
        | dict(
            row=whole_number(cells["row"]) if cells["row"] else None,
            settings=settings_from(cells),
            minutes=minutes,
            confusions=confusions_from(cells),
            history=history_from(cells),
            **{name: float(texts[name]) if texts[name] else None for name in ("seconds", "peak_memory_gb")},
            tokens_per_message=whole_number(texts["tokens_per_message"]) if texts["tokens_per_message"] else None,
        )
    )


# Columns that are no setting.
NO_SETTINGS = {"run", *(field.name for field in fields(Record)), "losses", "epoch_accuracies"}
NO_SETTINGS |= {f"{split}_{part}" for split in SPLITS for part in (*ACCURACY_PARTS, "errors", "mistakes")}


def settings_from(cells):
    """The settings of a line, {name: value}: numbers, True and False as such."""
    settings = {name: setting_from(text) for name, text in cells.items() if name not in NO_SETTINGS}
    return settings | dict(seed=whole_number(cells["seed"]), precision=cells.get("precision", "fp32"))


def setting_from(text):
    """The value of a cell."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return without_apostrophe(text)


def confusions_from(cells):
    """{split: Confusion}, or None for a line of an earlier version. Raises ValueError."""
    confusions = {split: confusion_from(cells, split) for split in SPLITS}
    return None if None in confusions.values() else confusions


def accuracy_from(correct, total):
    """The Accuracy of two cells. Raises ValueError."""
    accuracy = Accuracy(whole_number(correct), whole_number(total))
    if accuracy.correct > accuracy.total:
        raise ValueError(f"{correct} of {total}")
    return accuracy


def whole_number(text):
    """The number of a cell, of at most 19 digits. Raises ValueError."""
    if not re.fullmatch(r"\d{1,19}", text):
        raise ValueError(f"{text[:20]} is not a whole number")
    return int(text)

"""The results file: one line of CSV for each finished run, appended by any number of processes, and read back."""

import codecs
import csv
import io
import re
from dataclasses import fields
from pathlib import Path

from .dataset import SPLITS
from .files import FileError, append_bytes
from .locks import locked
from .records import Accuracy, Record

ACCURACY_PARTS = ("correct", "total", "fraction")
# What the report cannot do without; a file may lack other columns.
NEEDED = ["row", "configuration", "seed", "minutes", "device_name"]
NEEDED += [f"{split}_{part}" for split in SPLITS for part in ("correct", "total")]


DECIMALS = {"minutes": 4, "seconds": 2, "peak_memory_gb": 3}


def to_cells(record):
    """A Record's line of the file: {column: value}."""
    cells = {}
    for name, value in vars(record).items():
        if name == "settings":
            cells |= value
        elif isinstance(value, Accuracy):
            cells |= {f"{name}_{part}": getattr(value, part) for part in ACCURACY_PARTS}
        elif name != "history":
            cells[name] = round(value, DECIMALS[name]) if name in DECIMALS and value is not None else value
    return {column: one_line(value) if isinstance(value, str) else value for column, value in cells.items()}


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
    """The Record of a line, {column: text}; of the settings it has seed and precision. Raises ValueError."""
    texts = {field.name: without_apostrophe(cells.get(field.name, "")) for field in fields(Record)}
    minutes = float(cells["minutes"])
    if not 0 <= minutes < MAX_MINUTES:
        raise ValueError(f"{minutes} minutes")
    return Record(
        **texts
        | {split: accuracy_from(cells[f"{split}_correct"], cells[f"{split}_total"]) for split in SPLITS}
        | dict(
            row=whole_number(cells["row"]) if cells["row"] else None,
            settings=dict(seed=whole_number(cells["seed"]), precision=cells.get("precision", "fp32")),
            minutes=minutes,
            history=None,
            **{name: float(texts[name]) if texts[name] else None for name in ("seconds", "peak_memory_gb")},
            tokens_per_message=whole_number(texts["tokens_per_message"]) if texts["tokens_per_message"] else None,
        )
    )


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


def csv_line(cells):
    """The cells as a line of CSV, in bytes."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def append_record(path, record):
    """Append a Record as one line of a CSV file; a new file gets a header.

    Returns (the Path written to, whether it could be locked). Safe when several processes append at once: one lock,
    one write, flushed to disk; where the file system has no locks, the write at the end of the file alone. A file
    with other columns is left as it is; the record then goes to the first of `name-2.csv`, `name-3.csv`, … that has
    these columns or does not exist. A record whose `run`, the first column, is in the file already is not written
    again: a run that was interrupted between its record and its next checkpoint appends twice. Raises OSError where
    nothing can be written, and leaves no part.
    """
    cells = to_cells(record)
    header, line = csv_line(cells), csv_line(cells.values())
    path = destination = Path(path)
    number = 1
    while True:
        with open(destination, "ab+") as file, locked(file) as is_locked:
            file.seek(0)
            content = file.read()
            first_line = content.removeprefix(codecs.BOM_UTF8).split(b"\n")[0].rstrip(b"\r")
            if first_line == header.rstrip() or not content:
                if b"\n" + csv_line([record.run]).rstrip() + b"," not in content:
                    if not content:
                        line = header + line
                    elif not content.endswith(b"\n"):  # saved by an editor, or an incomplete line
                        line = b"\n" + line
                    append_bytes(file.fileno(), line, len(content))
                return destination, is_locked
        number += 1
        destination = path.with_name(f"{path.stem}-{number}{path.suffix}")


LINES_OF_A_RECORD = 5  # at most, of a record in which a text has line breaks


def read_records(path):
    """([Record, ...], [numbers of the lines that are none]) of a results file.

    A damaged line costs no other: a record may start at any line. Raises FileError for a file that is
    missing or has other columns.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # which reads \r\n as \n
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    csv.field_size_limit(2**31 - 1)
    try:
        columns = next(csv.reader(lines[:1]), [])
    except csv.Error as error:
        raise FileError(f"{path} is not a results file: {error}") from None
    for column in NEEDED:
        if column not in columns:
            raise FileError(f"{path} is not a results file: column {column} is missing")
    records, damaged = [], []
    number = 1
    while number < len(lines):
        for end in range(number + 1, min(number + 1 + LINES_OF_A_RECORD, len(lines) + 1)):
            if record := parse_record("\n".join(lines[number:end]), columns):
                records.append(record)
                number = end
                break
        else:
            if lines[number] not in ("", lines[0]):  # files that were joined have their header twice
                damaged.append(number + 1)
            number += 1
    return records, damaged


def parse_record(text, columns):
    """The Record that `text` is, as a whole, or None."""
    try:
        rows = list(csv.reader([text], strict=True))
        if len(rows) == 1 and len(rows[0]) == len(columns):
            return from_cells(dict(zip(columns, rows[0])))
    except (ValueError, csv.Error):
        pass
    return None

"""The results file: one line of CSV for each finished run, appended by any number of processes, and read back."""

import csv
import io
from dataclasses import fields
from pathlib import Path

from .dataset import SPLITS
from .files import FileError, append_bytes, locked
from .records import Accuracy, Record

ACCURACY_PARTS = ("correct", "total", "fraction")
# What the report cannot do without; a file may lack other columns.
NEEDED = ["row", "configuration", "seed", "minutes", "device_name"]
NEEDED += [f"{split}_{part}" for split in SPLITS for part in ("correct", "total")]


def to_cells(record):
    """A Record's line of the file: {column: value}."""
    cells = {}
    for name, value in vars(record).items():
        if name == "settings":
            cells |= value
        elif isinstance(value, Accuracy):
            cells |= {f"{name}_{part}": getattr(value, part) for part in ACCURACY_PARTS}
        elif name != "history":
            cells[name] = value
    return cells


def from_cells(cells):
    """The Record of a line, {column: text}; of the settings it has the seed only. Raises ValueError or TypeError."""
    texts = {field.name: cells.get(field.name, "") for field in fields(Record)}
    accuracies = {s: Accuracy(int(cells[f"{s}_correct"]), int(cells[f"{s}_total"])) for s in SPLITS}
    return Record(
        **texts
        | accuracies
        | dict(
            row=int(cells["row"]) if cells["row"] else None,
            settings=dict(seed=int(cells["seed"])),
            minutes=float(cells["minutes"]),
            history=None,
        )
    )


def csv_line(cells):
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def append_record(path, record):
    """Append a Record as one line of a CSV file; a new file gets a header. Returns the Path written to.

    Safe when several processes append at once: one lock, one write, flushed to disk. A file with other columns is
    left as it is; the record then goes to the first of `name-2.csv`, `name-3.csv`, … that has these columns or does
    not exist. A record whose `run`, the first column, is in the file already is not written again: a run that was
    interrupted between its record and its next checkpoint appends twice. Raises OSError where nothing can be
    written, and leaves no part.
    """
    cells = to_cells(record)
    header, line = csv_line(cells), csv_line(cells.values())
    path = destination = Path(path)
    number = 1
    while True:
        with open(destination, "ab+") as file, locked(file):
            file.seek(0)
            content = file.read()
            if content.startswith(header) or not content:
                if b"\n" + csv_line([record.run]).rstrip() + b"," not in content:
                    if not content:
                        line = header + line
                    elif not content.endswith(b"\n"):  # an editor's work, or an incomplete line
                        line = b"\n" + line
                    append_bytes(file.fileno(), line, len(content))
                return destination
        number += 1
        destination = path.with_name(f"{path.stem}-{number}{path.suffix}")


def read_records(path):
    """([Record, ...], [numbers of the lines that are none]) of a results file.

    The same seed with the same result on the same device is one run that was made twice: it counts once, or a
    standard deviation would come out too small.

    Raises FileError for a file that is missing or has other columns.
    """
    records, damaged = {}, []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for column in NEEDED:
                if column not in (reader.fieldnames or ()):
                    raise FileError(f"{path} is not a results file: column {column} is missing")
            for cells in reader:
                try:
                    record = from_cells(cells)
                except (TypeError, ValueError):  # TypeError: a line that ends early has None in its last columns
                    damaged.append(reader.line_num)
                    continue
                accuracies = tuple(getattr(record, split) for split in SPLITS)
                key = record.row, record.configuration, record.seed, accuracies, record.device_name
                records.setdefault(key, record)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return list(records.values()), damaged

"""The results file: one line of CSV for each finished run, appended by any number of processes, and read back."""

import codecs
import csv
import io
import os
from pathlib import Path

from runner.data.datasets import SPLITS
from runner.files import UserError, append_bytes
from runner.locks import locked
from runner.results.results_cells import from_cells, to_cells

# What the report cannot do without; a file may lack other columns.
NEEDED = ["row", "configuration", "seed", "minutes", "device_name"]
NEEDED += [f"{split}_{part}" for split in SPLITS for part in ("correct", "total")]


def csv_line(cells):
    """The cells as a line of CSV, in bytes."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def append_record(path, record):
    """Append a Record as one line of a CSV file; a new file gets a header.

    Returns (the Path written to, whether it could be locked). Safe when several processes append at once: one lock,
    one write, flushed to disk. A file with other columns is left as it is; the record then goes to the first of
    `name-2.csv`, `name-3.csv`, … that has these columns or does not exist. Where the file system has no locks it goes
    to the first that does not exist, so that hosts that share a folder cannot mix their lines. A record whose `run`,
    the first column, is in the file already is not written again: a run that was interrupted between its record and
    its next checkpoint appends twice. Raises OSError where nothing can be written, and leaves no part.
    """
    cells = to_cells(record)
    header, line = csv_line(cells), csv_line(cells.values())
    path = destination = Path(path)
    number = 1
    while True:
        try:
            file, is_new = open(destination, "ab+", opener=exclusively), True
        except FileExistsError:
            file, is_new = open(destination, "ab+"), False
        with file, locked(file) as is_locked:
            file.seek(0)
            content = file.read()
            first_line = content.removeprefix(codecs.BOM_UTF8).split(b"\n")[0].rstrip(b"\r")
            is_there = b"\n" + csv_line([record.run]).rstrip() + b"," in content
            if (first_line == header.rstrip() or not content) and (is_locked or is_new or is_there):
                if not is_there:
                    if not content:
                        line = header + line
                    elif not content.endswith(b"\n"):  # saved by an editor, or an incomplete line
                        line = b"\n" + line
                    append_bytes(file.fileno(), line, len(content))
                return destination, is_locked
        number += 1
        destination = path.with_name(f"{path.stem}-{number}{path.suffix}")


def exclusively(path, flags):
    """Open a file that is not there yet: of several processes one succeeds, also without locks."""
    return os.open(path, flags | os.O_EXCL, 0o666)


LINES_OF_A_RECORD = 5  # at most, of a record in which a text has line breaks


def read_records(path):
    """([Record, ...], [numbers of the lines that are none]) of a results file.

    A damaged line costs no other: a record may start at any line. Raises UserError for a file that is
    missing or has other columns.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # which reads \r\n as \n
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    csv.field_size_limit(2**31 - 1)
    try:
        columns = next(csv.reader(lines[:1]), [])
    except csv.Error as error:
        raise UserError(f"{path} is not a results file: {error}") from None
    for column in NEEDED:
        if column not in columns:
            raise UserError(f"{path} is not a results file: column {column} is missing")
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

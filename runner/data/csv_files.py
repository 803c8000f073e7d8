"""Read a CSV file of messages: its encoding, separator, columns and rows, and what is wrong with it, by line."""

import codecs
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from runner.files import UserError
from runner.wording import command_line


@dataclass(frozen=True)
class Layout:
    """What the header of a file says about its rows."""

    separator: str
    n_columns: int
    text: int  # the index of this column
    label: int | None

    def fits(self, fields):
        """Tell whether these can be the fields of a row; Excel leaves out empty ones at the end."""
        return max(self.text, self.label or 0) < len(fields) <= self.n_columns

    def label_of(self, fields):
        return "" if self.label is None else " ".join(fields[self.label].split())


def read_messages(path, text_column="Text", label_column="Label", is_labelled=True):
    """Return the messages of a CSV file, a DataFrame with columns Label, Text (str), file, line and holds_row.

    `line` is where a row begins; `holds_row` tells whether a text looks as if it had swallowed the next rows. The file
    is UTF-8, or UTF-16 with a byte order mark; the separator is a comma, semicolon or tab. Without `is_labelled` labels
    may be missing, and texts blank. Raises UserError that names file and line; pandas cannot be used here, because it
    does not report line numbers.
    """
    rows, blank, line, content = [], [], 1, Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 131,072 characters is an error
    try:
        file = io.StringIO(content.decode("utf-16" if is_utf16 else "utf-8-sig"), newline="")
        layout = parse_header(file, text_column, label_column, is_labelled)
        # With tabs, quotes are part of a text; but not in UTF-16: Excel's "Unicode text" has the quotes of CSV.
        has_quotes = layout.separator != "\t" or is_utf16
        quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
        reader, line = csv.reader(file, delimiter=layout.separator, quoting=quoting, strict=True), 2
        for fields in reader:
            if fields:  # not an empty line
                if not layout.fits(fields):
                    rule = f"that contains {layout.separator!r} needs quotes" if has_quotes else "cannot contain a tab"
                    raise ValueError(f"{len(fields)} instead of {layout.n_columns} fields; a text {rule}")
                label, text = layout.label_of(fields), fields[layout.text]
                if not (label and text.strip()):
                    blank.append(line)
                rows.append((label, text, str(path), line))
            line = reader.line_num + 2  # of the next row; the header is a line too
        if blank and is_labelled:
            line, *others = blank
            more = f", as in {len(others):,} more: lines {', '.join(map(str, others[:5]))}" * bool(others)
            raise ValueError(f"the label or the text is empty{more}{', …' * (len(others) > 5)}")
        if not rows:
            raise ValueError("no messages below the header")
    except (csv.Error, ValueError) as error:
        problem = error
        if isinstance(error, UnicodeDecodeError):
            line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
            encoding = "UTF-16" if is_utf16 else "UTF-8"
            problem = (
                f"byte 0x{byte:02x} is not {encoding}; save the file as CSV UTF-8, not in cp1252, cp932 or compressed"
            )
        elif isinstance(error, csv.Error):
            problem = f"a quote that opens here is not closed, or is closed too early ({error})"
        raise UserError(f"{path}, line {line}: {problem}") from None

    frame, labels = pd.DataFrame(rows, columns=["Label", "Text", "file", "line"]), {label for label, *_ in rows}

    def holds_row(text):
        parsed = (next(csv.reader([line], delimiter=layout.separator), []) for line in text.splitlines()[1:])
        return any(layout.fits(fields) and layout.label_of(fields) in labels for fields in parsed)

    return frame.assign(holds_row=[has_quotes and "\n" in text and holds_row(text) for text in frame["Text"]])


def key(column):
    """Return what the name of a column is compared by."""
    return column.strip().casefold()


def parse_header(file, text_column, label_column, is_labelled):
    """Return the Layout of a CSV file that is open at its first line.

    Raises ValueError, with the options that name columns of this file, if a column that is needed is not there once.
    """
    header, names = file.readline(), []
    wanted = [text_column, label_column] if is_labelled else [text_column]
    for separator in ",;\t":
        found = next(csv.reader([header], delimiter=separator), [])
        columns = [key(name) for name in found]
        if all(columns.count(key(column)) == 1 for column in wanted):
            label = columns.index(key(label_column)) if columns.count(key(label_column)) == 1 else None
            return Layout(separator, len(columns), columns.index(key(text_column)), label)
        if len(found) > len(names):
            names, rows = found, csv.reader(file, delimiter=separator)
    needed = " and ".join(f"one column {column}" for column in reversed(wanted))
    problem = f"the header must have {needed}; it is {header.strip()[:80]!r}"
    options = suggest_columns(names, list(rows), wanted) if names else ""
    raise ValueError(problem + f"; to use its own columns add {options}" * bool(options))


def suggest_columns(names, rows, wanted):
    """Return the options of the command line that name columns of a file with these names and rows; "" if none can be.

    Where a column that is wanted is missing, the longest values are the text, and the fewest distinct ones the labels.
    """
    keys, chosen = [key(name) for name in names], {}
    values = {name.strip(): [row[i] for row in rows if i < len(row)] for i, name in enumerate(names)}
    usable = {name: found for name, found in values.items() if key(name) and keys.count(key(name)) == 1}
    costs = (lambda name: -sum(map(len, usable[name]))), (lambda name: len(set(usable[name])))
    for option, column, cost in zip(("text_column", "label_column"), wanted, costs):
        present = [name for name in usable if key(name) == key(column)]
        others = [name for name in usable if key(name) not in [*map(key, wanted), *map(key, chosen.values())]]
        others = [name for name in others if len(set(usable[name])) > 1] or others  # at best no constant column
        if not (candidates := present or sorted(others, key=cost)):
            return ""
        chosen[option] = candidates[0]
    return command_line(chosen)

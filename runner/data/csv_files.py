"""Read a CSV file of messages: its encoding, separator, columns and rows, and what is wrong with it, by line."""

import codecs
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from runner.files import UserError
from runner.wording import command_line

TEXT, LABEL = "Text", "Label"  # the columns, unless options name others
USUAL_NAMES = {
    TEXT: {"message", "sentence", "tweet", "review", "comment", "comments", "content", "question", "headline"},
    LABEL: {"class", "category", "sentiment", "target", "intent", "topic", "polarity", "emotion", "rating", "stars"},
}


@dataclass(frozen=True)
class Layout:
    """What the header of a file says about its rows."""

    separator: str
    names: list  # of the columns
    text: int  # the index of this column
    label: int | None

    def fits(self, fields):
        """Return whether these can be the fields of a row; Excel leaves out empty ones at the end."""
        return max(self.text, self.label or 0) < len(fields) <= len(self.names)

    def label_of(self, fields):
        return "" if self.label is None else " ".join(fields[self.label].split())

    def holds_row(self, text, labels):
        """Return whether a line of a text, after its first, looks like a row with one of these labels."""
        rows = (next(csv.reader([line], delimiter=self.separator), []) for line in text.splitlines()[1:])
        return any(self.fits(fields) and self.label_of(fields) in labels for fields in rows)


def read_messages(path, text_column=TEXT, label_column=LABEL, is_labelled=True):
    """Return (the messages of a CSV file, a DataFrame with columns Label, Text (str), file and line; warnings).

    `line` is where a row begins. The file is UTF-8, or UTF-16 with a byte order mark; the separator is a comma,
    semicolon or tab. Rows without a text are left out, with a warning. Without `is_labelled` labels may be missing, and
    texts blank. Raises UserError that names file and line; pandas cannot be used here, because it does not report line
    numbers.
    """
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 131,072 characters is an error
    content, is_utf16 = decode(path)
    file = io.StringIO(content, newline="")
    try:
        layout = parse_header(file, text_column, label_column, is_labelled)
    except (csv.Error, ValueError) as error:
        raise line_error(path, 1, error) from None
    has_quotes = layout.separator != "\t" or is_utf16 or has_quoted_fields(content)
    rows, blank, unlabelled = [], [], []
    for line, fields in read_rows(path, file, layout, has_quotes):
        label, text = layout.label_of(fields), fields[layout.text]
        if is_labelled and not text.strip():
            blank.append(line)
        else:
            rows.append((label, text, str(path), line))
            unlabelled += [line] * (is_labelled and not label)
    if unlabelled:
        raise line_error(path, unlabelled[0], f"rows without a label: {count_lines(unlabelled)}")
    if not rows:
        only_blank = f", only rows without a text: {len(blank)}" * bool(blank)
        raise line_error(path, 2, f"no messages below the header{only_blank}")

    warnings, labels = guessed_columns(layout, text_column, label_column), {label for label, *_ in rows}
    if blank:
        warnings.append(f"rows without a text are left out: {count_lines(blank)}")
    if has_quotes and layout.separator == "\t" and not is_utf16:
        warnings.append("quotes are read as those of CSV, not as part of the texts")
    if layout.label is not None and has_quotes:
        if swallowed := [line for _, text, _, line in rows if "\n" in text and layout.holds_row(text, labels)]:
            problem = "texts of several lines that hold what looks like a row of the file"
            warnings.append(f"{problem}: {count_lines(swallowed)}; is a quote not closed?")
    return pd.DataFrame(rows, columns=[LABEL, TEXT, "file", "line"]), warnings


def line_error(path, line, problem):
    """Return the UserError for a problem in a line of a file."""
    return UserError(f"{path}, line {line}: {problem}")


def decode(path):
    """Return (the text of a file, whether it is UTF-16). Raises UserError for other encodings than UTF-8 and UTF-16."""
    content = Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig"), is_utf16
    except UnicodeDecodeError as error:
        line, byte = len(error.object[: error.start + 1].splitlines()), error.object[error.start]
        advice = "save the file as CSV UTF-8, not in cp1252, cp932 or compressed"
        problem = f"byte 0x{byte:02x} is not {'UTF-16' if is_utf16 else 'UTF-8'}; {advice}"
        raise line_error(path, line, problem) from None


def read_rows(path, file, layout, has_quotes):
    """Yield (line, fields) for each row of a CSV file that is open below its header. Raises UserError."""
    rule = f"that contains {layout.separator!r} needs quotes"
    if not has_quotes:
        rule = "cannot contain a tab or a line break; save the file with commas and quotes"
    quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    reader, line = csv.reader(file, delimiter=layout.separator, quoting=quoting, strict=True), 2
    try:
        for fields in reader:
            while len(fields) > len(layout.names) and not fields[-1].strip():
                fields.pop()  # separators at the end of a row
            if len(fields) > 1 or fields and (fields[0].strip() or len(layout.names) == 1):  # not an empty line
                if not layout.fits(fields):
                    problem = f"{len(fields)} instead of {len(layout.names)} fields; a text {rule}"
                    raise line_error(path, line, problem)
                yield line, fields
            line = reader.line_num + 2  # of the next row; the header is a line too
    except csv.Error as error:
        problem = f"a quote that opens here is not closed, or is closed too early ({error})"
        raise line_error(path, line, problem) from None


def count_lines(lines):
    """Return how many lines there are, and which: `34 (lines 7, 9, 12, 20, 21, …)`."""
    return f"{len(lines):,} (line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:5]))}{', …' * (len(lines) > 5)})"


def has_quoted_fields(content):
    """Return whether the quotes in a file with tabs are those of CSV, as pandas writes them.

    By default such quotes are part of the text, as such data is published. Here all fields are quoted, the first name
    of the header too; or all that begin with a quote end with one and need it: they contain a tab or a doubled quote.
    """
    if '"' not in content or content.startswith('"'):
        return content.startswith('"')
    quoted = re.compile(r'(?:^|(?<=\t))"((?:[^"\r\n]++|"")*+)"(?=[\t\r\n]|\Z)', re.M)
    fields, others = quoted.findall(content), quoted.sub("", content)
    return bool(fields) and all(re.search('\t|""', field) for field in fields) and not re.search('(?m)(^|\t)"', others)


# --- the header ---


def fold(column):
    """Return what the name of a column is compared by."""
    return column.strip().casefold()


def find_columns(names, text_column, label_column, is_labelled=True):
    """Return the indices of the columns of texts and of labels, None for one that cannot be identified.

    Where the default name is asked for and is missing, a usual name will do, or the other one of two columns. A label
    that is not needed is not guessed so.
    """
    keys, found, can_guess = [fold(name) for name in names], [], []
    for default, wanted in ((TEXT, text_column), (LABEL, label_column)):
        can_guess.append(wanted == default and fold(wanted) not in keys)
        accepted = USUAL_NAMES[default] if can_guess[-1] else {fold(wanted)}
        indices = [index for index, name in enumerate(keys) if name in accepted]
        found.append(indices[0] if len(indices) == 1 else None)
    for this, other in ((0, 1), (1, 0))[: 1 + is_labelled]:
        if len(keys) == 2 and found[this] is None and found[other] is not None and can_guess[this]:
            found[this] = 1 - found[other]
    return found


def guessed_columns(layout, text_column, label_column):
    """Return a line for each column whose name is not the one that was asked for."""
    return [
        f"column {layout.names[index].strip()!r} is read as {wanted}"
        for index, wanted in ((layout.text, text_column), (layout.label, label_column))
        if index is not None and fold(layout.names[index]) != fold(wanted)
    ]


def parse_header(file, text_column, label_column, is_labelled):
    """Return the Layout of a CSV file that is open at its first line.

    Raises ValueError for a column that cannot be identified, with the options that name columns of this file.
    """
    header, names = file.readline(), []
    if "\0" in header:  # of UTF-16 without a byte order mark
        raise ValueError("the header holds NUL characters; save the file as CSV UTF-8")
    for separator in ",;\t":
        found = next(csv.reader([header], delimiter=separator), [])
        text, label = find_columns(found, text_column, label_column, is_labelled)
        if text is not None and (label is not None or not is_labelled):
            return Layout(separator, found, text, label)
        if len(found) > len(names):
            names, rows = found, csv.reader(file, delimiter=separator)
    wanted = [text_column, label_column] if is_labelled else [text_column]
    needed = " and ".join(f"one column {column}" for column in reversed(wanted))
    problem = f"the header must have {needed}; it is {header.strip()[:80]!r}"
    rows = [row for row in rows if row] if names else []
    if rows and None not in find_columns(rows[0], text_column, label_column):
        problem += "; the next line has them: delete what is above"
    elif options := suggest_columns(names, rows, wanted):
        problem += f"; to use its own columns add {options}; if it is a message, put the names of the columns above it"
    raise ValueError(problem)


def suggest_columns(names, rows, wanted):
    """Return the options of the command line that name columns of a file with these names and rows; "" if none can be.

    Where a column that is wanted is missing, one with a usual name is taken; else the longest values are the text, and
    the fewest distinct ones the labels.
    """
    keys, chosen = [fold(name) for name in names], {}
    values = {name.strip(): [row[i] for row in rows if i < len(row)] for i, name in enumerate(names)}
    usable = {name: found for name, found in values.items() if fold(name) and keys.count(fold(name)) == 1}
    costs = (lambda name: -sum(map(len, usable[name]))), (lambda name: len(set(usable[name])))
    for (default, usual), option, column, cost in zip(
        USUAL_NAMES.items(), ("text_column", "label_column"), wanted, costs
    ):
        present = [name for name in usable if fold(name) == fold(column)]
        others = [name for name in usable if fold(name) not in [*map(fold, wanted), *map(fold, chosen.values())]]
        others = [name for name in others if len(set(usable[name])) > 1] or others  # at best no constant column
        others.sort(key=lambda name: (not any(word in fold(name) for word in {fold(default), *usual}), cost(name)))
        if not (candidates := present or others):
            return ""
        chosen[option] = candidates[0]
    return command_line(chosen)

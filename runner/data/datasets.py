"""The labelled messages: the collection or the user's own CSV files, labels, repeated messages."""

import codecs
import csv
import io
import os
import textwrap
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import pandas as pd

import gpt_download
from gpt_download import DEFAULT_DATA_DIR, SPLITS
from runner.files import UserError, sha256_of, sha256_of_json
from runner.wording import shown

DATASET_NAMES = {
    "uci": "SMS Spam Collection",
    "sample": "sample of the SMS Spam Collection (numbers do not compare with the table)",
    "own": "your own data (numbers do not compare with the table)",
}

FEATURES = "features"  # the subfolder of --data_dir with the cached frozen features


@dataclass(frozen=True)
class Dataset:
    """Labelled messages, and what identifies them."""

    name: str  # "uci", "sample" or "own"
    splits: dict  # {split: DataFrame with columns Label (int) and Text (str)}
    class_names: list  # of the K classes
    sha256: str  # of all labels and texts, as they were read
    duplicates: dict  # {split: Duplicates} of validation and test
    warnings: list  # lines about what the user probably did not intend

    @property
    def test_texts(self):
        return list(self.splits["test"]["Text"])


def load(data_dir, dataset, ignore_index):
    """Return the Dataset that --data_dir and --dataset name. Raises UserError: see `load_splits`, `encode_labels`."""
    splits, name = load_splits(data_dir, dataset)
    sha256 = sha256_of_splits(splits)
    splits, class_names, warnings = encode_labels(splits, name, data_dir, ignore_index)
    return Dataset(name, splits, class_names, sha256, find_duplicates(splits), warnings)


# --- which data ---


def load_splits(data_dir, dataset):
    """Return the splits {split: DataFrame with columns Label and Text (str)}, and their name: "uci", "sample" or "own".

    Label is an int, or the name of a class where the user's own labels are names: see `encode_labels`. The collection
    is downloaded if it is missing. Raises UserError for files that cannot be used, for a folder that was probably meant
    to hold other data, and for a failed download.
    """
    if dataset == "sample":
        return gpt_download.balanced_splits(gpt_download.sample_path()), "sample"
    paths = {split: Path(data_dir, f"{split}.csv") for split in SPLITS}
    present = {split: path for split, path in paths.items() if os.path.lexists(path)}  # a broken link too
    is_uci = all(sha256_of(path) == gpt_download.UCI_SPLITS_SHA256[split] for split, path in present.items())
    if len(present) == len(SPLITS):
        return {split: read_labelled_csv(path) for split, path in paths.items()}, "uci" if is_uci else "own"
    if not is_uci:
        found = " and ".join(path.name for path in present.values())
        raise UserError(f"--data_dir {data_dir} holds {found} alone; your own data needs all three files")
    if not present and data_dir != DEFAULT_DATA_DIR:  # the default folder is created, and may hold other files
        names = set(os.listdir(data_dir)) - {FEATURES} if os.path.isdir(data_dir) else {"no folder"}
        if {name for name in names if name[0] != "."} and names.isdisjoint(gpt_download.COLLECTION_NAMES):
            problem = (
                "does not exist, or holds other files than train.csv, validation.csv and test.csv (not compressed)"
            )
            raise UserError(f"--data_dir {data_dir} {problem}; the collection is downloaded into an empty folder")
    return gpt_download.make_uci_splits(data_dir), "uci"


def sha256_of_splits(splits):
    """Return the SHA-256 of the labels and texts of all splits."""
    return sha256_of_json([[splits[split][column].tolist() for column in ("Label", "Text")] for split in SPLITS])


# --- the user's own CSV files ---


def read_labelled_csv(path):
    """Return the messages of a CSV file, a DataFrame with columns Label, Text and line (where a row begins).

    The file is UTF-8, or UTF-16 with a byte order mark; the separator is a comma, semicolon or tab. Raises UserError
    that names file and line; pandas cannot be used here, because it does not report line numbers.
    """
    rows, line, content = [], 1, path.read_bytes()
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 131,072 characters is an error
    try:
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        file = io.StringIO(content.decode(encoding), newline="")
        separator, columns = parse_header(file.readline())
        reader, line = csv.reader(file, delimiter=separator, strict=True), 2
        for fields in reader:
            if fields:  # not an empty line
                row = dict(zip(columns, fields))
                if len(fields) > len(columns) or not {"label", "text"} <= row.keys():
                    problem = f"{len(fields)} instead of {len(columns)} fields"
                    raise ValueError(f"{problem}; a text that contains {separator!r} needs quotes")
                if not (row["label"].strip() and row["text"].strip()):
                    raise ValueError("the label or the text is empty")
                rows.append((parse_label(row["label"]), row["text"], line))
            line = reader.line_num + 2  # of the next row; the header is a line too
        if not rows:
            raise ValueError("no messages below the header")
    except (csv.Error, ValueError) as error:
        problem = error
        if isinstance(error, UnicodeDecodeError):
            line = error.object[: error.start].count(b"\n") + 1
            problem = f"not text ({error}); save it as CSV UTF-8, not compressed"
        elif isinstance(error, csv.Error):
            problem = f"a quote that opens here is not closed, or is closed too early ({error})"
        raise UserError(f"{path}, line {line}: {problem}") from None
    return pd.DataFrame(rows, columns=["Label", "Text", "line"])


def parse_header(header):
    """Return the separator and the lower-case columns of a CSV file with this first line. Raises ValueError."""
    for separator in ",;\t":
        columns = [column.strip() for column in next(csv.reader([header.lower()], delimiter=separator))]
        if columns.count("label") == columns.count("text") == 1:
            return separator, columns
    raise ValueError(f"the header must have one column Label and one column Text; it is {header.strip()[:80]!r}")


def parse_label(text):
    """Return a label as an int ("1.0" is 1), or as a name."""
    with suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    return " ".join(text.split())


# --- labels ---


def encode_labels(splits, name, data_dir, ignore_index):
    """Return the splits with labels as numbers from 0 to K-1, the names of these K classes, and a list of warnings.

    `splits` and `name` are what `load_splits` returns. Labels that are names are numbered in alphabetical order. A
    negative number equal to `ignore_index` marks a message without a label: it adds nothing to the loss and does not
    count in an accuracy. Raises UserError for labels from which nothing can be learned.
    """
    if name != "own":
        return splits, ["ham", "spam"], []
    unlabelled = [ignore_index] if ignore_index < 0 else []
    found = set(splits["train"]["Label"]).difference(unlabelled)
    if len(found) < 2:
        raise UserError(f"{data_dir}/train.csv: a classifier needs two classes or more; there is {found or 'none'}")
    if all(isinstance(label, str) for label in found):
        classes, unlabelled = sorted(found), []
    else:
        classes = list(takewhile(found.__contains__, count()))
    codes = {label: code for code, label in enumerate(classes)} | {label: label for label in unlabelled}
    for split, frame in splits.items():
        if len(unknown := frame[~frame["Label"].isin(codes)]):
            label, line = str(unknown["Label"].iloc[0])[:50], unknown["line"].iloc[0]
            problem = f"label {label} is none of the classes {textwrap.shorten(', '.join(map(str, classes)), 100)}"
            advice = "the labels of train.csv must be names, or 0, 1, 2 and so on"
            raise UserError(f"{data_dir}/{split}.csv, line {line}: {problem}; {advice}")
    labelled = {split: frame[~frame["Label"].isin(unlabelled)] for split, frame in splits.items()}
    splits = {split: frame.assign(Label=frame["Label"].map(codes)) for split, frame in splits.items()}
    return splits, [shown(str(label)) for label in classes], warnings_about(labelled)


def warnings_about(labelled):
    """Return lines about what the user probably did not intend, from the messages that have a label, by split."""
    none = [split for split, frame in labelled.items() if frame.empty]
    warnings = [f"no message of {split}.csv has a label: loss and accuracy on it are not known" for split in none]
    texts = pd.concat(labelled.values())[["Label", "Text"]].drop_duplicates()["Text"]
    if len(contradictory := texts[texts.duplicated()].unique()):
        example = textwrap.shorten(contradictory[0], 60)
        warnings.append(f'texts with contradictory labels: {len(contradictory):,}, among them "{example}"')
    return warnings


# --- messages that are repeated ---


@dataclass(frozen=True)
class Duplicates:
    """Indices of the labelled messages of a split that are among the training messages too."""

    exact: tuple[int, ...] = ()  # word for word
    similar: tuple[int, ...] = ()  # but for case, numbers and punctuation; the exact ones included


def find_duplicates(splits):
    """Return {split: Duplicates} of validation and test, from {split: DataFrame with columns Label and Text}."""
    train, found = splits["train"]["Text"], {}
    for split in ("validation", "test"):
        frame = splits[split].reset_index(drop=True)
        texts = frame["Text"][frame["Label"] >= 0]
        exact = texts.isin(train)
        similar = exact | texts.map(normalized).isin(set(map(normalized, train)) - {""})
        found[split] = Duplicates(*(tuple(texts.index[repeated].tolist()) for repeated in (exact, similar)))
    return found


def normalized(text):
    """Return a text without case, numbers and punctuation, in NFKC, with single spaces.

    Marks and symbols stay: a vowel sign makes another word, and an emoji another message.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c for c in folded if unicodedata.category(c)[0] not in "PN").split())

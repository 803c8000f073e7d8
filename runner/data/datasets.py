"""The labelled messages: the splits of the collection and of the sample, and the user's own CSV files."""

import codecs
import csv
import hashlib
import io
import os
import re
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import pandas as pd

import gpt_download
from runner.files import UserError, sha256_of, sha256_of_json, write_bytes

SPLITS = {"train": "Training", "validation": "Validation", "test": "Test"}

DATASET_NAMES = {
    "uci": "SMS Spam Collection",
    "sample": "sample of the SMS Spam Collection (numbers do not compare with the table)",
    "own": "your own data (numbers do not compare with the table)",
}

DEFAULT_DATA_DIR = "sms_spam_collection"
FEATURES = "features"  # in that folder: what earlier runs have kept

# Of the splits of the collection as they are written to --data_dir; other files are the user's own data.
UCI_SPLITS_SHA256 = {
    "train": "ec2895b026553ce06475815818c52cf44828af0605b07b257935a194e611195a",
    "validation": "f92996ef2ae2ed6d6937e96bc7a3f739f2bae59b07d1babd7f3725e473f2d2bd",
    "test": "f82216f37a6d785b52f99a84a3552dcc9835316018758c2117b2ca133e6c1409",
}


@dataclass
class Dataset:
    """Labelled messages, and what identifies them."""

    name: str  # "uci", "sample" or "own"
    class_names: list  # of the K classes
    sha256: str  # of all labels and texts
    test_texts: list  # of the test messages
    repeats: dict  # of validation and test, Repeats
    warnings: list  # lines about what is probably not meant
    messages: dict | None = None  # of each split, Messages
    limit: int | None = None  # in tokens, to which messages are cut, and padded where they are
    longest: int | None = None  # tokens of the longest message, pads included


def load(data_dir, dataset, ignore_index):
    """(a Dataset without its messages, the splits with numbered labels). Errors: `load_splits`, `number_labels`."""
    splits, name = load_splits(data_dir, dataset)
    sha256, test_texts = sha256_of_splits(splits), list(splits["test"]["Text"])
    splits, names, warnings = number_labels(splits, name, data_dir, ignore_index)
    return Dataset(name, names, sha256, test_texts, find_repeats(splits), warnings), splits


# --- splits ---


def load_splits(data_dir, dataset):
    """The labelled messages of each split, and what they are: "uci", "sample" or "own".

    Returns ({split: DataFrame with columns Label and Text (str)}, name). Label is an int, or the name of a class where
    the user's own labels are names: see `number_labels`. Downloads the collection if need be. Raises UserError for
    files that cannot be used and for a download that failed.
    """
    if dataset == "sample":
        return balanced_splits(gpt_download.sample_path()), "sample"
    paths = {split: Path(data_dir, f"{split}.csv") for split in SPLITS}
    present = {split: path for split, path in paths.items() if os.path.lexists(path)}  # also a link that leads nowhere
    is_uci = all(sha256_of(path) == UCI_SPLITS_SHA256[split] for split, path in present.items())
    if len(present) == len(SPLITS):
        return {split: read_labelled_csv(path) for split, path in paths.items()}, "uci" if is_uci else "own"
    if not is_uci:
        found = " and ".join(path.name for path in present.values())
        raise UserError(f"--data_dir {data_dir} holds {found} alone; your own data needs all three files")
    if not present:
        check_folder(data_dir)
    return make_uci_splits(data_dir, paths), "uci"


def check_folder(data_dir):
    """Raises UserError for a folder that was probably meant to hold other data: a missing one, or one with other files.

    The collection is downloaded into the default folder, which is made, or into an empty one.
    """
    if str(data_dir) == DEFAULT_DATA_DIR:
        return
    advice = "make an empty folder to have the collection downloaded into it, or put train.csv, validation.csv and "
    advice += "test.csv there, not compressed"
    if not os.path.isdir(data_dir):
        raise UserError(f"--data_dir {data_dir} does not exist; {advice}")
    names = {name for name in os.listdir(data_dir) if not name.startswith(".") and name != FEATURES}
    if names and names.isdisjoint(gpt_download.COLLECTION_NAMES):
        raise UserError(f"--data_dir {data_dir} holds {min(names)}, but no data of this program; {advice}")


def make_uci_splits(data_dir, paths):
    """The splits of the collection, which is fetched if need be; written to `paths` where that is possible."""
    splits = balanced_splits(gpt_download.fetch_collection(data_dir))
    contents = {split: frame.to_csv(index=None, lineterminator="\n").encode() for split, frame in splits.items()}
    if {split: hashlib.sha256(content).hexdigest() for split, content in contents.items()} != UCI_SPLITS_SHA256:
        raise UserError(f"pandas {pd.__version__} splits the collection differently; see requirements.txt")
    with suppress(OSError):  # a folder that cannot be written to serves as it is: they are made again in a second
        for split, content in contents.items():
            write_bytes(paths[split], content)
    return splits


def balanced_splits(path):
    """70% / 10% / 20% of the spam and as much ham from the collection at `path` (lines of label, tab, text).

    Seed and order of the shuffles are those of the public original. So is the reading: quotes are taken as CSV
    takes them, and a few messages that begin with one run together with their neighbours.
    """
    messages = pd.read_csv(path, sep="\t", header=None, names=["Label", "Text"])
    spam, ham = (messages[messages["Label"] == label] for label in ("spam", "ham"))
    balanced = pd.concat([ham.sample(len(spam), random_state=123), spam])
    for _ in range(2):
        balanced = balanced.sample(frac=1, random_state=123).reset_index(drop=True)
    balanced["Label"] = balanced["Label"].map({"ham": 0, "spam": 1})
    train_end = int(0.7 * len(balanced))
    validation_end = train_end + int(0.1 * len(balanced))
    return {
        "train": balanced[:train_end],
        "validation": balanced[train_end:validation_end],
        "test": balanced[validation_end:],
    }


# --- the user's own CSV files ---


def read_labelled_csv(path):
    """The messages of a CSV file: a DataFrame with columns Label, Text, and line, the one on which a row begins.

    UTF-8, or UTF-16 with its byte order mark; the separator is a comma, semicolon or tab. Raises UserError that names
    file and line. (Not pandas: it takes a message "NA" for a missing one, and knows no line numbers.)
    """
    rows, line, content = [], 1, path.read_bytes()
    csv.field_size_limit(2**31 - 1)
    try:
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        file = io.StringIO(content.decode(encoding), newline="")
        separator, columns = parse_header(file.readline())
        reader = csv.reader(file, delimiter=separator, strict=True)
        line = 2
        for fields in reader:
            if fields:  # not an empty line
                row = dict(zip(columns, fields))
                if len(fields) > len(columns) or not {"label", "text"} <= row.keys():
                    problem = f"{len(fields)} instead of {len(columns)} fields"
                    raise ValueError(f"{problem}; a text that contains {separator!r} needs quotes")
                if not row["text"].strip():
                    raise ValueError("the text is empty")
                rows.append((parse_label(row["label"]), row["text"], line))
            line = reader.line_num + 2  # the next row's; the header is a line too
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not text ({error}); save it as CSV UTF-8, not compressed") from None
    except csv.Error as error:
        problem = "a quote that opens here is not closed, or is closed too early; a quote in a quoted text is doubled"
        raise UserError(f"{path}, line {line}: {problem} ({error}, line {reader.line_num + 1})") from None
    except ValueError as error:
        raise UserError(f"{path}, line {line}: {error}") from None
    if not rows:
        raise UserError(f"{path}: no messages below the header")
    return pd.DataFrame(rows, columns=["Label", "Text", "line"])


def parse_header(header):
    """Separator and columns, in small letters, of a CSV file with this first line. Raises ValueError."""
    for separator in ",;\t":
        columns = [column.strip() for column in next(csv.reader([header.lower()], delimiter=separator))]
        if columns.count("label") == columns.count("text") == 1:
            return separator, columns
    raise ValueError(f"the header must have one column Label and one column Text; it is {header.strip()[:80]!r}")


def parse_label(text):
    """A label as an int, from "1.0" too, or as a name. Raises ValueError."""
    name = " ".join(text.split())
    if not name:
        raise ValueError("the label is empty (where labels are numbers, --ignore_index stands for none)")
    try:
        number = float(name)
    except ValueError:
        return name
    if not number.is_integer():
        raise ValueError(f'label "{name[:50]}" is neither a whole number nor a name')
    return int(number)


# --- labels ---


def number_labels(splits, name, data_dir, ignore_index):
    """The splits with labels as numbers from 0 to K-1, the names of these K classes, and warnings, a list.

    `splits` and `name` are what `load_splits` returns. Labels that are names are numbered in alphabetical order. A
    negative number equal to `ignore_index` marks a message without a label: it adds nothing to the loss and is not
    counted in an accuracy. Raises UserError for labels from which nothing can be learned.
    """
    if name != "own":
        return splits, ["ham", "spam"], []
    unlabelled = [ignore_index] if ignore_index < 0 else []
    found = set(splits["train"]["Label"]).difference(unlabelled)
    if len(found) < 2:
        problem = f"every label is {found.pop()}" if found else "no message has a label"
        raise UserError(f"{data_dir}/train.csv: {problem}; a classifier needs two classes or more")
    if all(isinstance(label, str) for label in found):
        classes, unlabelled = sorted(found), []
    else:
        classes = list(takewhile(found.__contains__, count()))
    numbers = {label: number for number, label in enumerate(classes)} | {label: label for label in unlabelled}
    for split, frame in splits.items():
        unknown = frame[~frame["Label"].isin(numbers)]
        if not unknown.empty:
            label, line = str(unknown["Label"].iloc[0])[:50], unknown["line"].iloc[0]
            problem = "all labels of train.csv must be names, or 0, 1, 2 and so on, none left out"
            if split != "train":
                known = textwrap.shorten(", ".join(map(str, classes)), 100)
                problem = f"the labels of the training messages are {known}"
            raise UserError(f"{data_dir}/{split}.csv, line {line}: label {label}, but {problem}")
    warnings = warnings_about({split: frame[~frame["Label"].isin(unlabelled)] for split, frame in splits.items()})
    splits = {split: frame.assign(Label=frame["Label"].map(numbers)) for split, frame in splits.items()}
    return splits, [str(label) for label in classes], warnings


def warnings_about(labelled):
    """What is probably not meant in the messages that have a label, {split: DataFrame}: a list of lines."""
    none = [split for split, frame in labelled.items() if frame.empty]
    warnings = [f"no message of {split}.csv has a label: loss and accuracy on it are not known" for split in none]
    messages = pd.concat(labelled.values())[["Label", "Text"]]
    texts = messages.drop_duplicates()["Text"]
    if len(contradictory := texts[texts.duplicated()].unique()):
        labels = messages["Label"][messages["Text"] == contradictory[0]].value_counts(sort=False)
        labels = " and ".join(f"{label} ({n} times)" for label, n in labels.items())
        text = textwrap.shorten(contradictory[0], 60)
        warnings.append(f'texts with contradictory labels: {len(contradictory):,}, among them "{text}": {labels}')
    return warnings


def sha256_of_splits(splits):
    """SHA-256 of the labels and texts of all splits."""
    return sha256_of_json([[splits[split][column].tolist() for column in ("Label", "Text")] for split in SPLITS])


@dataclass(frozen=True)
class Repeats:
    """Numbers of the labelled messages of a split that are among the training messages too."""

    exact: tuple = ()  # word for word
    similar: tuple = ()  # where case, digits and punctuation do not count; the exact ones included


def find_repeats(splits):
    """{"validation": Repeats, "test": Repeats} of the splits, {split: DataFrame with columns Label and Text}."""
    train, found = splits["train"]["Text"], {}
    for split in ("validation", "test"):
        frame = splits[split].reset_index(drop=True)
        texts = frame["Text"][frame["Label"] >= 0]
        exact = texts.isin(train)
        similar = exact | texts.map(letters_of).isin(set(map(letters_of, train)) - {""})
        found[split] = Repeats(*(tuple(texts.index[repeated].tolist()) for repeated in (exact, similar)))
    return found


def describe_repeats(data):
    """A line on the repeated messages of a Dataset, if it has any: a list."""
    counts = [
        f"{len(found.exact)} of {len(data.messages[split]):,} {split} messages word for word, {len(found.similar)} but "
        "for case, digits and punctuation"
        for split, found in data.repeats.items()
        if found.similar
    ]
    return [f"Also among the training messages: {'; '.join(counts)}"] if counts else []


def letters_of(text):
    """A text without case, digits and punctuation."""
    return re.sub(r"[^\w\s]|[\d_]", "", text.lower()).strip()

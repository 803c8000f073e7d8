"""The labelled messages: the splits of the collection and of the sample, and the user's own CSV files."""

import csv
import hashlib
import json
import re
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import gpt_download
from runner.files import UserError, sha256_of, write_bytes

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
    """The three splits as tokens, and what identifies them."""

    messages: dict  # of each split, Messages
    limit: int  # in tokens, to which messages are cut, and padded where they are
    longest: int  # tokens of the longest message, pads included
    name: str  # "uci", "sample" or "own"
    class_names: list  # of the K classes
    sha256: str  # of all labels and texts
    test_texts: list  # of the test messages
    repeats: dict  # of validation and test, Repeats


# --- splits ---


def load_splits(data_dir, dataset, quiet=False):
    """The labelled messages of each split, and what they are: "uci", "sample" or "own".

    Returns ({split: DataFrame with columns Label (int) and Text (str)}, name). Downloads the collection if need
    be. Raises UserError for files that cannot be used, UserError for a download that failed.
    """
    if dataset == "sample":
        return balanced_splits(gpt_download.sample_path()), "sample"

    data_dir = Path(data_dir)
    paths = {split: data_dir / f"{split}.csv" for split in SPLITS}
    check_data_dir(data_dir, paths)
    if not all(path.exists() for path in paths.values()):
        write_uci_splits(data_dir, paths, quiet)
    splits = {split: read_labelled_csv(path) for split, path in paths.items()}
    is_uci = all(sha256_of(paths[split]) == UCI_SPLITS_SHA256[split] for split in SPLITS)
    return splits, "uci" if is_uci else "own"


def check_data_dir(data_dir, paths):
    """Raises UserError for a folder that was probably meant to hold other data than the collection.

    The collection is downloaded into the default folder, or into an empty one. `paths` are those of the splits.
    """
    advice = "make an empty folder to have the collection downloaded into it, or put train.csv, validation.csv and "
    advice += "test.csv there"
    if not data_dir.exists() and (data_dir.is_symlink() or str(data_dir) != DEFAULT_DATA_DIR):
        raise UserError(f"--data_dir {data_dir} does not exist; {advice}")
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder")
    for path in paths.values():
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {path.readlink()}, which does not exist")
    if not data_dir.exists() or str(data_dir) == DEFAULT_DATA_DIR:
        return
    ours = {*(path.name for path in paths.values()), *gpt_download.COLLECTION_NAMES}
    names = {path.name for path in data_dir.iterdir() if not path.name.startswith(".") and path.suffix != ".part"}
    names -= {FEATURES}
    if names and not names & ours:
        raise UserError(f"--data_dir {data_dir} holds neither the three files nor the collection; {advice}")


def write_uci_splits(data_dir, paths, quiet):
    """Write the splits of the collection to `paths`, fetching it if need be. Errors: those of `load_splits`."""
    for split, path in paths.items():  # an interrupted run may have left some of them; all others are the user's
        if path.exists() and sha256_of(path) != UCI_SPLITS_SHA256[split]:
            missing = " and ".join(other.name for other in paths.values() if not other.exists())
            raise UserError(f"{data_dir} holds {path.name} but not {missing}; your own data needs all three")
    existed = data_dir.exists()
    try:
        gpt_download.check_writable(data_dir)
        splits = balanced_splits(gpt_download.fetch_collection(data_dir, quiet))
    except BaseException:
        if not existed:
            with suppress(OSError):  # not there, or not empty
                data_dir.rmdir()
        raise
    contents = {split: frame.to_csv(index=None, lineterminator="\n").encode() for split, frame in splits.items()}
    for split, content in contents.items():
        if hashlib.sha256(content).hexdigest() != UCI_SPLITS_SHA256[split]:
            raise UserError(f"pandas {pd.__version__} splits the collection differently; see requirements.txt")
    for split, content in contents.items():
        write_bytes(paths[split], content)


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


def read_labelled_csv(path):
    """The columns Label and Text of a CSV file, and for each row the line on which it ends, as a DataFrame.

    Raises UserError that names file and line. (Not pandas: it takes a message "NA" for a missing one, and knows
    no line numbers.)
    """
    labels, texts, lines = array("q"), [], array("q")
    csv.field_size_limit(2**31 - 1)
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise UserError(f"{path}: not a regular file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = next(reader, None)
            check_columns(path, columns)
            label_at, text_at = columns.index("Label"), columns.index("Text")
            for fields in reader:
                if not fields:  # an empty line
                    continue
                if len(fields) < len(columns):
                    fields += [""] * (len(columns) - len(fields))
                label, text = fields[label_at], fields[text_at]
                if problem := problem_of(label, text, len(fields) > len(columns)):
                    raise UserError(f"{path}, line {reader.line_num}: {problem}")
                labels.append(int(label))
                texts.append(text)
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not texts:
        raise UserError(f"{path}: no messages below the header")
    return pd.DataFrame({"Label": np.asarray(labels), "Text": texts, "line": np.asarray(lines)})


def check_columns(path, columns):
    """Raises UserError for a header, a list of names or None, without the columns that are read."""
    if columns is None:
        raise UserError(f"{path}: the file is empty")
    for column in columns:
        if columns.count(column) > 1:
            raise UserError(f"{path}: there are {columns.count(column)} columns {column}")
    for column in ("Label", "Text"):
        if column not in columns:
            raise UserError(f"{path}: column {column} is missing; the columns are {', '.join(columns)}")


MAX_DIGITS = 18  # of a label: what is longer does not fit PyTorch's integers
MAX_SPACES = 100_000  # or other whitespace, in a row; the tokenizer fails somewhere above 300,000


def problem_of(label, text, is_longer):
    """Why a row of a CSV file, longer than its header or not, is no labelled message; None if it is one."""
    if not re.fullmatch(r"\s*-?\d+\s*", label):
        return f'label "{label[:50]}" is not a whole number'
    if len(label.strip()) > MAX_DIGITS:
        return f"a label of {len(label.strip())} digits is too large"
    if not text.strip():
        return "the text is empty"
    if is_longer:
        return "more fields than columns; a text with a comma needs quotes"
    return problem_of_text(text)


def problem_of_text(text):
    """Why the tokenizer cannot take a message; None if it can."""
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # how Python shows what it could not decode
        return "not UTF-8 text"
    if len(text) > MAX_SPACES and re.search(rf"\s{{{MAX_SPACES + 1}}}", text):
        return f"the text has more than {MAX_SPACES:,} whitespace characters in a row"


def refuse_label(splits, split, data_dir, wrong, problem):
    """Raises UserError for the first message of a split that `wrong` (bool for each) marks."""
    first = splits[split][wrong].iloc[0]
    raise UserError(f"{data_dir}/{split}.csv, line {first['line']}: label {first['Label']}, {problem}")


def count_classes(splits, ignore_index, data_dir):
    """K, from the labels 0..K-1 of the training messages. Raises UserError for labels that are not these.

    A negative label equal to `ignore_index` marks a message without a label: it adds nothing to the loss and is
    not counted in an accuracy.
    """
    labels = {split: frame["Label"] for split, frame in splits.items()}
    unlabelled = {split: (column < 0) & (column == ignore_index) for split, column in labels.items()}
    train = labels["train"]
    if (train == ignore_index).all():
        raise UserError(f"every training label is the ignored one, {ignore_index}: nothing to learn from")
    classes = sorted(train[~unlabelled["train"]].unique().tolist())
    if classes[0] != 0:
        problem = f"but labels start at 0; the training file's start at {classes[0]}"
        refuse_label(splits, "train", data_dir, train == classes[0], problem)
    for label, expected in zip(classes, range(len(classes))):
        if label != expected:
            problem = f"but no training message has label {expected}"
            refuse_label(splits, "train", data_dir, train == label, problem)
    if len(classes) == 1:
        raise UserError(f"{data_dir}/train.csv: every label is 0; a classifier needs two classes or more")
    for split in SPLITS:
        unknown = ~labels[split].isin(classes) & ~unlabelled[split]
        if unknown.any():
            problem = f"which no training message has; their labels are 0 to {classes[-1]}"
            refuse_label(splits, split, data_dir, unknown, problem)
    return len(classes)


def class_names(name, n_classes):
    """The names of the K classes of the data that `load_splits` calls by this name."""
    return ["ham", "spam"] if name != "own" and n_classes == 2 else [str(label) for label in range(n_classes)]


def sha256_of_splits(splits):
    """SHA-256 of the labels and texts of all splits."""
    content = json.dumps([[splits[split][column].tolist() for column in ("Label", "Text")] for split in SPLITS])
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Repeats:
    """Numbers of the labelled messages of a split that are among the training messages too."""

    exact: tuple = ()  # word for word
    similar: tuple = ()  # where case, digits and punctuation do not count; the exact ones included


def find_repeats(splits):
    """{"validation": Repeats, "test": Repeats} of the splits, {split: DataFrame with columns Label and Text}."""
    train = splits["train"]["Text"]
    known, known_similar = set(train), set(map(letters_of, train)) - {""}
    found = {}
    for split in ("validation", "test"):
        columns = zip(splits[split]["Text"], splits[split]["Label"], strict=True)
        texts = [(number, text) for number, (text, label) in enumerate(columns) if label >= 0]
        exact = {number for number, text in texts if text in known}
        similar = exact | {number for number, text in texts if letters_of(text) in known_similar}
        found[split] = Repeats(tuple(sorted(exact)), tuple(sorted(similar)))
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

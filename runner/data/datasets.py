"""The labelled messages: the collection or the user's own files, splits, labels, repeated messages."""

import os
import re
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import gpt_download
from gpt_download import DEFAULT_DATA_DIR, SPLITS
from runner.data.csv_files import read_messages
from runner.files import UserError, sha256_of, sha256_of_json
from runner.wording import printable

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
    notes: list  # lines about how the data was read
    warnings: list  # lines about what the user probably did not intend

    @property
    def test_texts(self):
        return list(self.splits["test"]["Text"])

    def warnings_about_first(self, n):
        """Return a line if the first `n` validation messages, which are evaluated during training, are of one class."""
        labels = self.splits["validation"]["Label"]
        first, others = (part[part >= 0].unique() for part in (labels[:n], labels[n:]))
        if self.name != "own" or len(first) != 1 or not set(others) - set(first):
            return []
        first = f"the first {n} validation messages are all {self.class_names[first[0]]}"
        return [f"{first}: losses and accuracies during training are of that class only; shuffle the file"]


def load(experiment):
    """Return the Dataset of an Experiment. Raises UserError: see `load_splits`, `encode_labels`."""
    data_dir, columns = experiment.data_dir, (experiment.text_column, experiment.label_column)
    splits, name, warnings = load_splits(data_dir, experiment.dataset, *columns)
    sha256 = sha256_of_json([[splits[split][column].tolist() for column in ("Label", "Text")] for split in SPLITS])
    notes = []
    if name == "own" and os.path.isfile(data_dir):
        split = "70% training, 10% validation and 20% test messages"
        notes = [f"{data_dir} is split at random, always in the same way: {split} of each class"]
    splits, class_names = encode_labels(splits, name, data_dir, experiment.ignore_index)
    duplicates = find_duplicates(splits)
    if name == "own":
        notes.append(f"{len(class_names)} classes: {textwrap.shorten(', '.join(class_names), 100, placeholder=' …')}")
        warnings += warnings_about(splits, class_names, duplicates)
    return Dataset(name, splits, class_names, sha256, duplicates, notes, warnings)


# --- which data ---

# The names of the files of a split, each of which can end in .tsv too.
STEMS = {"train": ("train",), "validation": ("validation", "val", "dev", "valid"), "test": ("test",)}


def split_names(split):
    """Return the names that the file of a split can have in --data_dir."""
    return [stem + suffix for stem in STEMS[split] for suffix in (".csv", ".tsv")]


def possible_inputs(data_dir):
    """Return the paths that --data_dir can stand for: a file, or the files of a folder."""
    names = *(name for split in SPLITS for name in split_names(split)), *gpt_download.COLLECTION_NAMES
    return [Path(data_dir)] if os.path.isfile(data_dir) else [Path(data_dir, name) for name in names]


def load_splits(data_dir, dataset, text_column="Text", label_column="Label"):
    """Return (splits {split: DataFrame with columns Label and Text (str)}, "uci", "sample" or "own", warnings).

    Label is a number, or the name of a class where the user's own labels are names: see `parse_labels`. The collection
    is downloaded if it is missing. Raises UserError for files that cannot be used, and for a failed download.
    """
    if dataset == "sample":
        sample = gpt_download.check_unchanged(gpt_download.SAMPLE, gpt_download.SAMPLE_SHA256)
        return gpt_download.balanced_splits(sample), "sample", []
    is_file = os.path.isfile(data_dir)
    if is_file and sha256_of(data_dir) == gpt_download.COLLECTION_SHA256:
        return gpt_download.balanced_splits(data_dir), "uci", []
    paths = dict(train=Path(data_dir)) if is_file else find_files(data_dir)
    if not paths:
        return gpt_download.make_uci_splits(data_dir), "uci", []
    is_uci = are_uci_splits(paths) and not is_file
    read = [read_messages(path, *(() if is_uci else (text_column, label_column))) for path in paths.values()]
    splits = parse_labels({split: messages for split, (messages, _) in zip(paths, read)})
    splits = split_at_random(splits["train"], data_dir) if is_file else splits
    of_paths = {}  # {warning: the files of which it is true}
    for path, (_, warnings) in zip(paths.values(), read):
        for warning in warnings:
            of_paths.setdefault(warning, []).append(str(path))
    warnings = [f"{', '.join(files)}: {warning}" for warning, files in of_paths.items()]
    return splits, "uci" if is_uci else "own", warnings


def find_files(data_dir):
    """Return the files of a folder {split: path}, or {} if the collection is to be fetched into it.

    Raises UserError if a split is missing or there twice, and for a folder that was probably meant to hold other data.
    """
    paths = {split: [Path(data_dir, name) for name in split_names(split)] for split in SPLITS}
    found = [[path for path in of_split if os.path.lexists(path)] for of_split in paths.values()]  # a broken link too
    if several := [" and ".join(path.name for path in of_split) for of_split in found if len(of_split) > 1]:
        raise UserError(f"--data_dir {data_dir} holds {', '.join(several)}: move all but one of a split away")
    present = {split: of_split[0] for split, of_split in zip(SPLITS, found) if of_split}
    if len(present) == len(SPLITS):
        return present
    if not are_uci_splits(present):
        names = " and ".join(path.name for path in present.values())
        missing = " and no ".join(f"{split}.csv" for split in SPLITS if split not in present)
        advice = "a single file is split if --data_dir names the file itself"
        raise UserError(f"--data_dir {data_dir} holds {names}, but no {missing} (or .tsv); {advice}")
    if not present and data_dir != DEFAULT_DATA_DIR:  # the default folder is created, and may hold other files
        if not os.path.isdir(data_dir):
            advice = "the collection is downloaded into an empty folder"
            raise UserError(f"--data_dir {data_dir}: there is no such file or folder; {advice}")
        names = sorted(name for name in set(os.listdir(data_dir)) - {FEATURES} if name[0] != ".")
        if names and set(names).isdisjoint(gpt_download.COLLECTION_NAMES):
            problem = f"holds {textwrap.shorten(', '.join(names), 100, placeholder=' …')}"
            advice = "rename them to train.csv, validation.csv and test.csv, or name a single one, which is then split"
            raise UserError(f"--data_dir {data_dir} {problem}; {advice}")
    return {}


def are_uci_splits(paths):
    """Return whether all these files {split: path} are splits of the collection."""
    return all(sha256_of(path) == gpt_download.UCI_SPLITS_SHA256[split] for split, path in paths.items())


def split_at_random(messages, path):
    """Return splits of 70, 10 and 20% of the messages of each class, in random order.

    They depend on the messages only, not on the order of the file. Every class has a training message. Raises UserError
    if there are too few messages.
    """
    ordered = messages.sort_values(["Label", "Text"]).sample(frac=1, random_state=123)
    ordered = ordered.sort_values("Label", kind="stable")
    turn, is_first = np.arange(len(ordered)) % 10, ~ordered["Label"].duplicated()
    split_of = np.select([is_first | (turn < 7), turn == 7], ["train", "validation"], "test")
    splits = {split: ordered[split_of == split].sample(frac=1, random_state=123) for split in SPLITS}
    if any(frame.empty for frame in splits.values()):
        counts = f"{len(messages):,} messages with {messages['Label'].nunique():,} different labels"
        raise UserError(f"--data_dir {path}: {counts} are too few to be split; each label needs one for training")
    return {split: frame.reset_index(drop=True) for split, frame in splits.items()}


# --- labels ---

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def parse_labels(splits):
    """Return {split: DataFrame} with labels as numbers if all of the training split are numbers."""
    if not all(map(NUMBER.fullmatch, splits["train"]["Label"])):
        return splits
    return {
        split: frame.assign(Label=pd.Series(list(map(parse_label, frame["Label"])), frame.index, dtype=object))
        for split, frame in splits.items()
    }


def parse_label(text):
    """Return a label as an int ("1.0" is 1) or a float, or the text if it is no number."""
    if not NUMBER.fullmatch(text):
        return text
    if "." not in text:
        return int(text)
    return int(number) if (number := float(text)).is_integer() else number


def encode_labels(splits, name, data_dir, ignore_index):
    """Return the splits with labels as numbers from 0 to K-1, and the names of these K classes.

    `splits` and `name` are what `load_splits` returns. The classes are the labels of the training split, in the order
    of numbers or of the alphabet. A negative number equal to `ignore_index` marks a message without a label: it adds
    nothing to the loss and does not count in an accuracy. Raises UserError for labels that nothing can be learned from.
    """
    unlabelled = {ignore_index, str(ignore_index)} if ignore_index < 0 else set()
    classes = sorted(set(splits["train"]["Label"]) - unlabelled)
    names = [printable(str(label)) for label in classes] if name == "own" else ["ham", "spam"]
    if len(classes) < 2:
        found = names[0] if names else "none"
        raise UserError(f"--data_dir {data_dir}: a classifier needs two classes or more; in training there is {found}")
    codes = {label: code for code, label in enumerate(classes)}
    if any(numbers.get(ignore_index, ignore_index) != ignore_index for numbers in (codes, dict(enumerate(classes)))):
        advice = "mark messages without a label by a negative number"
        raise UserError(f"--ignore_index {ignore_index}: the labels are not 0, 1, 2 and so on; {advice}")
    codes |= dict.fromkeys(unlabelled, ignore_index)
    for frame in splits.values():
        for row, label in enumerate(frame["Label"]):
            if label not in codes:
                label, where = printable(str(label))[:50], "{file}, line {line}".format(**frame.iloc[row])
                known = textwrap.shorten(", ".join(names), 100)
                raise UserError(f"{where}: label {label} is not among those of the training messages: {known}")
    return {split: frame.assign(Label=frame["Label"].map(codes)) for split, frame in splits.items()}, names


def warnings_about(splits, class_names, duplicates):
    """Return lines about what the user probably did not intend in their own data."""
    warnings, variants = [], {}
    labelled = {split: frame[frame["Label"] >= 0] for split, frame in splits.items()}
    for split, frame in labelled.items():
        if frame.empty:
            warnings.append(f"no {split} message has a label: there is no loss and no accuracy for this split")
        elif split in duplicates and 2 * (n := len(duplicates[split].exact)) >= len(frame):
            counts = f"{n:,} of {len(frame):,} {split} messages are among the training messages, word for word"
            warnings.append(f"{counts}: accuracy on them says little about new messages")
    for name in class_names:
        variants.setdefault(name.casefold(), []).append(name)
    if alike := [" and ".join(names) for names in variants.values() if len(names) > 1]:
        warnings.append(f"classes whose names differ in case only: {', '.join(alike)}")
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
    similar: tuple[int, ...] = ()  # ignoring case, numbers and punctuation; includes the exact ones


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

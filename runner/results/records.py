"""One finished run: its history, its results, and the JSON file that holds them."""

import json
import math
import platform
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import get_type_hints

import pandas as pd
import tiktoken
import torch

from runner.data.datasets import SPLITS, Repeats
from runner.files import UserError, sha256_of_json, write_bytes
from runner.machine.devices import describe_devices
from runner.results.accuracy import Accuracy, Confusion, Mistake
from runner.rows import ROWS
from runner.saved.checkpoints import run_identity
from runner.wording import changed_options, describe_settings


@dataclass
class History:
    """What a run printed, as numbers and as lines. It only grows."""

    steps: list = field(default_factory=list)  # at which the losses were evaluated
    train_losses: list = field(default_factory=list)
    val_losses: list = field(default_factory=list)
    train_accuracies: list = field(default_factory=list)  # Accuracy of the first messages after each epoch
    val_accuracies: list = field(default_factory=list)
    lines: list = field(default_factory=list)

    def add_line(self, line):
        """Add a line and return it."""
        self.lines.append(line)
        return line

    def add_losses(self, epoch, step, train_loss, val_loss):
        """Add an evaluation and return its line."""
        self.steps.append(step)
        self.train_losses.append(train_loss)
        self.val_losses.append(val_loss)
        return self.add_line(f"Ep {epoch} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")

    def add_accuracies(self, train, val):
        """Add the accuracies after an epoch, which are of the first messages only, and return their line."""
        self.train_accuracies.append(train)
        self.val_accuracies.append(val)
        return self.add_line(
            f"Training accuracy: {train} | Validation accuracy: {val} "
            f"(first messages only: {train.correct}/{train.total}, {val.correct}/{val.total})"
        )

    def to_dict(self):
        """Its lists, as JSON can hold them."""
        lists = vars(self)
        return {name: [asdict(e) if isinstance(e, Accuracy) else e for e in lists[name]] for name in lists}

    @classmethod
    def from_dict(cls, lists):
        """What `to_dict` gave, also after a round trip through JSON."""
        return cls(**{name: [Accuracy(**e) if isinstance(e, dict) else e for e in lists[name]] for name in lists})


MAX_TEXTS = 10  # of the most confident test mistakes
VERSION = 1  # of the file


@dataclass(frozen=True)
class Record:
    """One finished run. The printed row, its JSON file and the report are made from it."""

    run: str  # the name of its file: what makes it this run
    date: str
    row: int | None  # of the published table, if the run was one of its rows
    configuration: str  # in words
    options: dict  # what tells it from row 1, see `options_of`
    settings: dict  # the Experiment's, by name; of a baseline none
    seed: int | None  # None: of a baseline, which draws no random numbers
    precision: str
    weights_sha256: str  # "" of random weights
    data: str  # "uci", "sample" or "own"
    data_sha256: str
    class_names: list  # of the K classes
    tokens_per_message: int | None  # of the longest message, pads included
    confusions: dict  # {split: Confusion}
    repeats: dict  # {split: Repeats} of validation and test
    texts: dict  # {number: text} of the most confident test mistakes
    minutes: float  # of training alone
    feature_seconds: float  # what the frozen features took when they were first computed
    seconds: float  # of the whole run
    peak_memory_gb: float | None  # None: not known
    device: str  # its type
    device_name: str
    python: str
    torch: str
    tiktoken: str
    pandas: str
    note: str = ""
    history: History = field(default_factory=History)
    is_baseline: bool = False

    train = property(lambda self: self.confusions["train"].accuracy, doc="Accuracy of all training messages.")
    validation = property(lambda self: self.confusions["validation"].accuracy, doc="Of the validation messages.")
    test = property(lambda self: self.confusions["test"].accuracy, doc="Of the test messages.")

    @property
    def unseen(self):
        """The Accuracy of the test messages that are not, in similar form, among the training messages."""
        return without(self.confusions["test"], self.repeats["test"].similar)

    def to_dict(self):
        """What `from_dict` takes; JSON can hold it."""
        confusions = {
            split: dict(totals=found.totals, mistakes=[list(vars(mistake).values()) for mistake in found.mistakes])
            for split, found in self.confusions.items()
        }
        derived = {split: asdict(getattr(self, split)) for split in (*SPLITS, "unseen")}
        repeats = {split: asdict(found) for split, found in self.repeats.items()}
        derived |= dict(version=VERSION, confusions=confusions, repeats=repeats, history=self.history.to_dict())
        f1 = {split: found.macro_f1 for split, found in self.confusions.items()}
        macro_f1 = {split: None if math.isnan(value) else round(value, 6) for split, value in f1.items()}
        return vars(self) | derived | dict(macro_f1=macro_f1)

    @classmethod
    def from_dict(cls, content):
        """What `to_dict` gave, also after a round trip through JSON.

        Raises ValueError, KeyError or TypeError for anything else, so that the report can rely on what it shows.
        """
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, not {VERSION}")
        parts = {setting.name: content[setting.name] for setting in fields(cls)}
        parts["repeats"] = {
            split: Repeats(tuple(found["exact"]), tuple(found["similar"]))
            for split, found in content["repeats"].items()
        }
        parts["confusions"] = {
            split: Confusion(tuple(found["totals"]), tuple(Mistake(*entry) for entry in found["mistakes"]))
            for split, found in content["confusions"].items()
        }
        parts["texts"] = {int(number): text for number, text in content["texts"].items()}
        parts["history"] = History.from_dict(content["history"])
        for name, kind in get_type_hints(cls).items():
            if not isinstance(parts[name], (kind, int) if kind is float else kind):
                raise TypeError(f"{name} is {str(parts[name])[:50]}")
        record = cls(**parts)
        record.check()
        return record

    def check(self):
        """Raises ValueError where the parts do not fit together."""
        curves, K = (self.history.steps, self.history.train_losses, self.history.val_losses), len(self.class_names)
        confusions, repeats = [self.confusions[split] for split in SPLITS], self.repeats["test"]
        mistakes = [mistake for confusion in confusions for mistake in confusion.mistakes]
        counts = [*repeats.exact, *repeats.similar, *(n for confusion in confusions for n in confusion.totals)]
        counts += [number for mistake in mistakes for number in (mistake.number, mistake.label, mistake.called)]
        numbers = [self.minutes, *(value for curve in curves for value in curve), *(m.confidence for m in mistakes)]
        fits = (
            all(isinstance(count, int) and count >= 0 for count in counts),
            all(isinstance(value, int | float) and math.isfinite(value) for value in numbers),
            all(isinstance(text, str) for text in (*self.class_names, *self.texts.values())),
            all(isinstance(value, str | int | float) for value in self.options.values()),
            all(m.label < K > m.called for m in mistakes) and {*map(len, curves)} == {len(self.history.steps)},
            all(len(found.totals) == K and len(found.mistakes) <= sum(found.totals) for found in confusions),
        )
        if not all(fits):
            raise ValueError("its parts do not fit together")


def without(confusion, numbers):
    """The Accuracy of the messages but for those with these numbers, all of which have a label."""
    wrong = sum(mistake.number not in numbers for mistake in confusion.mistakes)
    total = sum(confusion.totals) - len(numbers)
    return Accuracy(total - wrong, total)


# --- what makes a run this run ---

# The same run with any value of these gives the same numbers, or is told apart by the content of its files.
FREE_OPTIONS = ("seed", "device", "precision", "features", "data_dir")


def options_of(experiment, data, weights):
    """What tells a configuration from row 1, whatever its seed, device, precision and paths: {option: value}."""
    options = {name: value for name, value in changed_options(experiment).items() if name not in FREE_OPTIONS}
    if weights.is_published:
        options.pop("weights", None)
    elif not weights.is_random:
        options["weights"] = f"{Path(weights.source).name} {weights.sha256[:8]}"
    if data.name == "own":
        options["data"] = f"own data {data.sha256[:8]}"
    return options


def row_number(options):
    """The number of the row of the published table with these options, as of `options_of`, or None."""
    return next((number for number, row in ROWS.items() if row.options == options), None)


def run_name(experiment, data, weights, device):
    """The name of a run's file, known before it starts: `row16-seed123-3f9c2a1b`.

    The hash is of all that the numbers depend on: settings, data, weights, precision, type of device.
    """
    options = options_of(experiment, data, weights)
    row, identity = row_number(options), run_identity(experiment, data, weights, device)
    return file_name(f"row{row}" if row else describe_settings(options), f"-seed{experiment.seed}", identity)


def file_name(words, seed, identity):
    """Words as any file system takes them, `-seed123` or nothing, and 8 digits of a hash of what JSON can hold."""
    short = re.sub(r"[^a-z0-9.]+", "-", words.lower())[:60].strip("-.")
    return f"{short}{seed}-{sha256_of_json(identity)[:8]}"


def new_record(data, confusions, **further):
    """The Record of a run that finishes now on a Dataset, with these {split: Confusion}; `further` are its other fields."""
    worst = confusions["test"].most_confident(MAX_TEXTS)
    return Record(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        python=platform.python_version(),
        torch=str(torch.__version__),
        tiktoken=tiktoken.__version__,
        pandas=pd.__version__,
        data=data.name,
        data_sha256=data.sha256,
        class_names=list(data.class_names),
        tokens_per_message=data.longest,
        confusions=confusions,
        repeats=data.repeats,
        texts={mistake.number: data.test_texts[mistake.number] for mistake in worst},
        **further,
    )


def make_record(experiment, data, weights, confusions, state, **noted):
    """The Record of a run that finishes now.

    `state` is its TrainingState, `confusions` are {split: Confusion}, and `noted` are the fields `minutes`,
    `feature_seconds` and `note`.
    """
    options, usage = options_of(experiment, data, weights), state.usage.so_far()
    return new_record(
        data,
        confusions,
        run=run_name(experiment, data, weights, state.device),
        row=row_number(options),
        configuration=describe_settings(options),
        options=options,
        settings=asdict(experiment),
        seed=experiment.seed,
        precision=experiment.precision,
        weights_sha256=weights.sha256 or "",
        seconds=usage["total"],
        peak_memory_gb=usage["peak_memory"] / 1e9 or None,
        device=state.device.type,
        device_name=describe_devices(state.device),
        history=state.history,
        **noted,
    )


def describe_test(confusion, repeats):
    """Lines that stand beside a test accuracy: without repeated messages, and what lopsided classes make of it."""
    lines = []
    if numbers := repeats.similar:
        accuracy = without(confusion, numbers)
        lines.append(f"Test accuracy without the {len(numbers)} that are like training messages: {accuracy.in_full}")
    if confusion.most_frequent.fraction > 0.6:
        lines.append(f"Test accuracy of always the most frequent class: {confusion.most_frequent}")
    if needs_macro_f1(confusion):
        lines.append(f"Test macro-averaged F1: {confusion.macro_f1:.3f}")
    return lines


def needs_macro_f1(confusion):
    """Whether accuracy alone says little: more than two classes, or one more than twice as large as another."""
    return len(confusion.totals) > 2 or max(confusion.totals) > 2 * min(confusion.totals)


# --- files ---


def write_record(folder, record):
    """Write a Record to its file, in place of that of the same run before. Returns the path. Raises OSError."""
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder, f"{record.run}.json")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.to_dict().items())
    write_bytes(path, f"{{\n{lines}\n}}\n".encode())
    return path


def read_record(path):
    """The Record in a file. Raises UserError where there is none."""
    try:
        return Record.from_dict(json.loads(Path(path).read_bytes()))
    except OSError as error:
        reason = error.strerror or error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = "not complete" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is no record of a run ({str(reason)[:100]})")


def read_records(folders):
    """([Record, ...] by date, [a line for each file that holds none]). Raises UserError for what is no folder."""
    records, problems = [], []
    for folder in map(Path, folders):
        if folder.suffix == ".csv":
            raise UserError(f"--report {folder}: results.csv of earlier versions is not read; name a folder of records")
        if not folder.is_dir():
            raise UserError(f"--report {folder}: there is no such folder; runs write their records there")
        for path in sorted(folder.glob("*.json")):
            try:
                records.append(read_record(path))
            except UserError as error:
                problems.append(f"{error}; skipped")
    return sorted(records, key=lambda record: record.date), problems

"""One finished run: its history, its results, and the JSON file that holds them."""

import json
import math
import platform
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

import pandas as pd
import tiktoken
import torch

from runner.data.datasets import SPLITS, Repeats
from runner.files import UserError, sha256_of_json, write_bytes
from runner.machine.devices import describe_devices
from runner.results.accuracy import Confusion, Mistake
from runner.rows import ROWS
from runner.saved.checkpoints import run_identity
from runner.wording import changed_options, describe_settings


@dataclass
class History:
    """What a run printed, as numbers and as lines. It only grows; JSON can hold it."""

    steps: list = field(default_factory=list)  # at which the losses were evaluated
    train_losses: list = field(default_factory=list)
    val_losses: list = field(default_factory=list)
    train_accuracies: list = field(default_factory=list)  # [correct, total] of the first messages after each epoch
    val_accuracies: list = field(default_factory=list)
    lines: list = field(default_factory=list)

    def add_line(self, line):
        """Add a line and return it, as the others do."""
        self.lines.append(line)
        return line

    def add_losses(self, epoch, step, train_loss, val_loss):
        self.steps.append(step)
        self.train_losses.append(train_loss)
        self.val_losses.append(val_loss)
        train, val = ("n/a" if math.isnan(loss) else f"{loss:.3f}" for loss in (train_loss, val_loss))  # without labels
        return self.add_line(f"Ep {epoch} (Step {step:06d}): Train loss {train}, Val loss {val}")

    def add_accuracies(self, train, val):
        """Add the Accuracies after an epoch, which are of the first messages only."""
        self.train_accuracies.append(list(train))
        self.val_accuracies.append(list(val))
        counts = f"{train.correct}/{train.total}, {val.correct}/{val.total}"
        return self.add_line(f"Training accuracy: {train} | Validation accuracy: {val} (first messages only: {counts})")


VERSION = 2  # of the file
VERSIONS = {module.__name__: str(module.__version__) for module in (torch, tiktoken, pd)}


@dataclass(frozen=True)
class Record:
    """One finished run. The printed row, its JSON file and the report are made from it."""

    run: str  # the name of its file: what makes it this run
    configuration: str  # in words
    data: str  # "uci", "sample" or "own"
    data_sha256: str
    class_names: list  # of the K classes
    tokens_per_message: int | None  # of the longest message, pads included
    confusions: dict  # {split: Confusion}
    repeats: dict  # {split: Repeats} of validation and test
    texts: list  # of the most confident test mistakes, in the order of `most_confident`
    minutes: float  # of training alone
    seconds: float  # of the whole run
    note: str = ""
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    versions: dict = field(default_factory=lambda: dict(python=platform.python_version()) | VERSIONS)
    # What a baseline does without.
    row: int | None = None  # of the published table, if the run was one of its rows
    options: dict = field(default_factory=dict)  # what tells it from row 1, but for seed, device, precision and paths
    settings: dict = field(default_factory=dict)  # the Experiment's, by name
    seed: int | None = None
    weights_sha256: str = ""  # "" of random weights
    feature_seconds: float = 0.0  # what the frozen features took when they were first computed
    peak_memory_gb: float | None = None  # of the process up to the end of this run; None for linear models
    precision: str = "fp32"
    device: str = "cpu"  # its type
    device_name: str = "CPU"
    history: History = field(default_factory=History)
    is_baseline: bool = False

    train = property(lambda self: self.confusions["train"].accuracy)
    validation = property(lambda self: self.confusions["validation"].accuracy)
    test = property(lambda self: self.confusions["test"].accuracy)

    # Of the test messages that are not, in similar form, among the training messages.
    unseen = property(lambda self: self.confusions["test"].accuracy_excluding(self.repeats["test"].similar))

    @property
    def name(self):
        """What tells its configuration from those of other runs: `row 16`, `lr 0.001, bf16`."""
        name = self.configuration if self.row is None else f"row {self.row}"
        return name + f", {self.precision}" * (self.precision != "fp32")

    def to_dict(self):
        """What `from_dict` takes, and what is worked out from it: JSON can hold it."""
        accuracies = {split: getattr(self, split)._asdict() for split in (*SPLITS, "unseen")}
        macro_f1 = {split: found.macro_f1 for split, found in self.confusions.items()}
        return dict(version=VERSION) | asdict(self) | accuracies | dict(macro_f1=macro_f1)

    @classmethod
    def from_dict(cls, content):
        """What `to_dict` gave, also after a round trip through JSON. Raises ValueError, KeyError or TypeError."""
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, not {VERSION}")
        parts = {part.name: content[part.name] for part in fields(cls)}
        parts["confusions"] = {
            split: Confusion(found["totals"], [Mistake(*mistake) for mistake in found["mistakes"]])
            for split, found in content["confusions"].items()
        }
        parts["repeats"] = {split: Repeats(**found) for split, found in content["repeats"].items()}
        parts["history"] = History(**content["history"])
        return cls(**parts)


# --- what makes a run this run ---

# No part of a configuration: noted apart, without effect on a number, or known by the content of the files.
FREE_OPTIONS = ("seed", "device", "precision", "features", "data_dir")


def identify(experiment, data, weights, device):
    """What makes a run this run, known before it starts: the fields run, row, configuration and options of its Record.

    The name of its file, `row16-seed123-3f9c2a1b`, has a hash of its `run_identity`.
    """
    options = {name: value for name, value in changed_options(experiment).items() if name not in FREE_OPTIONS}
    if weights.is_published:
        options.pop("weights", None)
    elif not weights.is_random:
        options["weights"] = f"{Path(weights.source).name} {weights.sha256[:8]}"
    if data.name == "own":
        options["data"] = f"own data {data.sha256[:8]}"
    row = next((number for number, row in ROWS.items() if row.options == options), None)
    configuration = describe_settings(options)
    words = f"row{row}" if row else configuration[:100]
    run = file_name(f"{words} seed{experiment.seed}", run_identity(experiment, data, weights, device))
    return dict(run=run, row=row, configuration=configuration, options=options)


def file_name(words, identity):
    """Words as any file system takes them, and 8 digits of a hash of what JSON can hold."""
    return re.sub(r"[^a-z0-9.]+", "-", f"{words} {sha256_of_json(identity)[:8]}".lower())


def new_record(data, confusions, **further):
    """The Record of a run that finishes now on a Dataset, with these {split: Confusion} and `further` fields."""
    return Record(
        data=data.name,
        data_sha256=data.sha256,
        class_names=list(data.class_names),
        tokens_per_message=data.longest,
        confusions=confusions,
        repeats=data.repeats,
        texts=[data.test_texts[mistake.index] for mistake in confusions["test"].most_confident(10)],
        **further,
    )


def make_record(experiment, data, weights, confusions, state, **noted):
    """The Record of a run of GPT-2 that finishes now, with this TrainingState; `noted` are further fields."""
    usage = state.usage()
    return new_record(
        data,
        confusions,
        settings=asdict(experiment),
        seed=experiment.seed,
        precision=experiment.precision,
        weights_sha256=weights.sha256 or "",
        seconds=usage["total"],
        peak_memory_gb=usage["peak_memory"] / 1e9,
        device=state.device.type,
        device_name=describe_devices(state.device),
        history=state.history,
        **identify(experiment, data, weights, state.device),
        **noted,
    )


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a run ({type(error).__name__}: {error})") from None


def read_records(folders):
    """([Record, ...] by date, [a line for each file that holds none]). Raises UserError for what is no folder."""
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise UserError(f"--report {missing[0]}: there is no such folder")
    records, problems = [], []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.json"))):
        try:
            records.append(read_record(path))
        except UserError as error:
            problems.append(f"{error}; skipped")
    return sorted(records, key=lambda record: record.date), problems

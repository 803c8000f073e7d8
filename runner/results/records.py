"""One finished run: its history, its results, and the JSON file that holds them."""

import json
import math
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pandas as pd
import tiktoken
import torch

from gpt_download import is_published
from runner.data.datasets import SPLITS, Duplicates
from runner.files import UserError, sha256_of_json, write_bytes
from runner.results.accuracy import Confusion
from runner.rows import ROWS
from runner.wording import changed_options, describe_settings


@dataclass
class History:
    """What a run has printed, as numbers and as lines."""

    steps: list[int] = field(default_factory=list)  # at which the losses were evaluated
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    # [correct, total] of the first messages after each epoch
    train_accuracies: list[list[int]] = field(default_factory=list)
    val_accuracies: list[list[int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add_losses(self, epoch, step, train_loss, val_loss):
        """Add the losses at a step and return the line that is printed."""
        self.steps.append(step)
        self.train_losses.append(train_loss)
        self.val_losses.append(val_loss)
        train, val = ("n/a" if math.isnan(loss) else f"{loss:.3f}" for loss in (train_loss, val_loss))  # without labels
        self.lines.append(f"Ep {epoch} (Step {step:06d}): Train loss {train}, Val loss {val}")
        return self.lines[-1]

    def add_accuracies(self, train, val):
        """Add the Accuracies of the first messages after an epoch and return the line that is printed."""
        self.train_accuracies.append(list(train))
        self.val_accuracies.append(list(val))
        counts = f"{train.correct}/{train.total}, {val.correct}/{val.total}"
        self.lines.append(f"Training accuracy: {train} | Validation accuracy: {val} (first messages only: {counts})")
        return self.lines[-1]


VERSION = 3  # of the file
Setting = str | bool | int | float
VERSIONS = {module.__name__: str(module.__version__) for module in (torch, tiktoken, pd)}


@dataclass(frozen=True)
class Record:
    """One finished run. The printed row, its JSON file and the report are made from it."""

    run_id: str  # the name of its file: what makes it this run
    configuration: str  # in words
    data: str  # "uci", "sample" or "own"
    data_sha256: str
    class_names: list[str]  # of the K classes
    confusions: dict[str, Confusion]  # {split: Confusion}
    duplicates: dict[str, Duplicates]  # {split: Duplicates} of validation and test
    texts: list[str]  # of the most confident test mistakes, in the order of `most_confident`
    minutes: float  # of training alone
    seconds: float  # of the whole run
    note: str = ""
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=lambda: dict(python=platform.python_version()) | VERSIONS)
    # Fields that a baseline lacks.
    tokens_per_message: int | None = None  # of the longest message, padding included
    row: int | None = None  # of the published table, if the run was one of its rows
    # Those that differ from the defaults, except seed, device, precision and paths.
    options: dict[str, Setting] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)  # the Experiment's, by name
    seed: int | None = None
    weights_sha256: str = ""  # "" for random weights
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
    unseen = property(lambda self: self.confusions["test"].accuracy_excluding(self.duplicates["test"].similar))

    @property
    def name(self):
        """Return the name of its configuration: `row 16`, `lr 0.001, bf16`."""
        name = self.configuration if self.row is None else f"row {self.row}"
        return name + f", {self.precision}" * (self.precision != "fp32")

    def to_dict(self):
        """Return all fields, and what follows from them, for JSON."""
        accuracies = {split: getattr(self, split)._asdict() for split in (*SPLITS, "unseen")}
        macro_f1 = {split: found.macro_f1 for split, found in self.confusions.items()}
        return dict(version=VERSION) | asdict(self) | accuracies | dict(macro_f1=macro_f1)

    @classmethod
    def from_dict(cls, content):
        """Return the Record of what `to_dict` gave, also after a round trip through JSON.

        Raises an exception of any type for what is not a record: a value has another type, or values conflict.
        """
        if (version := content["version"]) != VERSION:
            age = "an older" if version < VERSION else "a newer"
            raise UserError(f"was written by {age} version; move it away, or use --results DIR")
        record = restore(cls, content)
        datetime.fromisoformat(record.date).astimezone()
        n_classes = {len(record.confusions[split].totals) for split in SPLITS}
        has_seed = record.seed is not None
        if n_classes != {len(record.class_names)} or has_seed == record.is_baseline or record.unseen.total < 0:
            raise ValueError("its fields do not belong together")
        return record


def restore(kind, value):
    """Return what JSON holds as a value of a type, such as `dict[str, Confusion]`. Raises an exception for others."""
    parts = get_args(kind)
    if isinstance(kind, UnionType):
        return restore(type(value) if type(value) in parts else parts[0], value)
    if get_origin(kind) is dict:
        return {name: restore(parts[1], item) for name, item in value.items()}
    if parts:  # list[int], tuple[int, ...]
        return get_origin(kind)(restore(parts[0], item) for item in value)
    if issubclass(kind, tuple):  # a NamedTuple is a list in JSON
        value = dict(zip(kind._fields, value, strict=True))
    if hints := get_type_hints(kind):
        return kind(**{name: restore(part, value[name]) for name, part in hints.items()})
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:50]!r} is no {kind.__name__}")
    return value


# --- what makes a run the same run ---

# Options that change no number of a run: where it computes, and where its files are.
NOT_IDENTIFYING = ("device", "features", "activation_checkpointing", "shard", "data_dir")
NOT_IDENTIFYING += ("text_column", "label_column")


def run_identity(experiment, data, weights):
    """Return what makes a run the same run, {name: value}: with any other value its numbers would differ."""
    settings = {name: value for name, value in asdict(experiment).items() if name not in NOT_IDENTIFYING}
    return settings | dict(weights=weights.sha256 or "random", data=data.sha256)


def identify(experiment, data, weights):
    """Return the fields of a Record that are known before its run starts: run_id, row, configuration and options.

    run_id, `row16-seed123-3f9c2a1b`, ends with a hash of the `run_identity`.
    """
    excluded = ("seed", "precision", *NOT_IDENTIFYING)
    options = {name: value for name, value in changed_options(experiment).items() if name not in excluded}
    if is_published(experiment.model_size, weights.sha256):
        options.pop("weights", None)
    elif not weights.is_random:
        options["weights"] = f"file {weights.sha256[:8]}"
    if data.name == "own":
        options["data"] = f"own data {data.sha256[:8]}"
    row = next((number for number, row in ROWS.items() if row.options == options), None)
    configuration = describe_settings(options)
    words = f"row{row}" if row else configuration[:100]
    run_id = file_name(f"{words} seed{experiment.seed}", run_identity(experiment, data, weights))
    if data.name == "own":  # in words only: the same data may be elsewhere
        configuration += f" ({Path(experiment.data_dir).resolve().name})"
    return dict(run_id=run_id, row=row, configuration=configuration, options=options)


def find_record(folder, experiment, data, weights):
    """Return the Record of a run in a folder, whatever device it ran on, or None. Raises UserError."""
    paths = sorted(Path(folder).glob(f"{identify(experiment, data, weights)['run_id']}*.json"))
    if not paths:
        return None
    record, settings = read_record(paths[0]), asdict(experiment)
    if any(record.settings.get(name) != settings[name] for name in settings.keys() - {"weights", *NOT_IDENTIFYING}):
        raise UserError(f"{paths[0]} was changed: its settings are not those of this run; move it away")
    return record


def file_name(words, identity):
    """Return a file name that any system accepts: words, and 8 digits of a hash of what JSON can hold."""
    return re.sub(r"[^a-z0-9.]+", "-", f"{words} {sha256_of_json(identity)[:8]}".lower())


def new_record(data, confusions, **further):
    """Return the Record of a run that finishes now, from its Dataset, {split: Confusion} and `further` fields."""
    return Record(
        data=data.name,
        data_sha256=data.sha256,
        class_names=list(data.class_names),
        confusions=confusions,
        duplicates=data.duplicates,
        texts=[data.test_texts[mistake.index] for mistake in confusions["test"].most_confident(10)],
        **further,
    )


def make_record(experiment, data, weights, confusions, state, **further):
    """Return the Record of a run of GPT-2 that finishes now, from its TrainingState and `further` fields."""
    usage, identity = state.usage(), identify(experiment, data, weights)
    if state.device.type != "cpu":  # runs on several types of device have a file each
        identity["run_id"] += f"-{state.device.type}"
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
        device_name=state.environment["device"],
        history=state.history,
        **identity,
        **further,
    )


# --- files ---


def write_record(folder, record):
    """Write a Record to its file, in place of an earlier one of the same run; return the path. Raises OSError."""
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder, f"{record.run_id}.json")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.to_dict().items())
    write_bytes(path, f"{{\n{lines}\n}}\n".encode())
    return path


def read_record(path):
    """Return the Record in a file. Raises UserError whatever is wrong with the file."""
    try:
        return Record.from_dict(json.loads(Path(path).read_bytes()))
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except Exception as error:
        raise UserError(f"{path} is no record of a run ({type(error).__name__}: {error})") from None


def read_records(folders):
    """Return ([Record, ...] by date, [a line for each other file]). Raises UserError for a missing folder."""
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise UserError(f"--report {missing[0]}: there is no such folder; the first finished run creates it")
    records, problems = [], []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.json"))):
        try:
            records.append(read_record(path))
        except UserError as error:
            problems.append(f"{error}; skipped")
    return sorted(records, key=lambda record: datetime.fromisoformat(record.date).astimezone()), problems

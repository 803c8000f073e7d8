"""One finished run: its results and its history."""

import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime

import pandas as pd
import tiktoken
import torch

from runner.data.datasets import SPLITS
from runner.machine.devices import describe_devices
from runner.results.accuracy import Accuracy, Confusion, Mistake


@dataclass
class History:
    """What a run printed, as numbers and as lines. It only grows."""

    steps: list = field(default_factory=list)  # at which the losses were evaluated
    train_losses: list = field(default_factory=list)
    val_losses: list = field(default_factory=list)
    train_accuracies: list = field(default_factory=list)  # Accuracy after each epoch
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
        """Add the accuracies after an epoch and return their line."""
        self.train_accuracies.append(train)
        self.val_accuracies.append(val)
        return self.add_line(
            f"Training accuracy: {train} | Validation accuracy: {val} ({train.correct}/{train.total}, "
            f"{val.correct}/{val.total}; 95% intervals {train.bounds}, {val.bounds})"
        )

    def to_dict(self):
        """Its lists, as JSON can hold them."""
        lists = vars(self)
        return {name: [asdict(e) if isinstance(e, Accuracy) else e for e in lists[name]] for name in lists}

    @classmethod
    def from_dict(cls, lists):
        """What `to_dict` gave, also after a round trip through JSON."""
        return cls(**{name: [Accuracy(**e) if isinstance(e, dict) else e for e in lists[name]] for name in lists})


@dataclass(frozen=True)
class Record:
    """One finished run. The printed row, the line of the results file and the report are made from it."""

    run: str  # an identifier
    date: str
    row: int | None  # of the table, if the run was one of its rows
    configuration: str
    settings: dict  # the Experiment's, by name
    weights_sha256: str
    data: str  # "uci", "sample" or "own"
    data_sha256: str
    tokens_per_message: int | None  # of the longest message, pads included
    train: Accuracy
    validation: Accuracy
    test: Accuracy
    minutes: float  # of training, features included
    seconds: float  # of the whole run
    peak_memory_gb: float | None  # None: not known
    device_name: str
    python: str
    torch: str
    tiktoken: str
    pandas: str
    confusions: dict | None = None  # of each split, a Confusion; None: not known, in files of earlier versions
    history: History | None = None  # None: not known, as before; of a results file without its lines

    @property
    def seed(self):
        """The seed of the run."""
        return self.settings["seed"]

    def to_dict(self):
        """What `from_dict` takes; JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries):
        """What `to_dict` gave, also after a round trip through JSON."""
        accuracies = {split: Accuracy(**entries[split]) for split in SPLITS}
        confusions = entries.get("confusions")  # a checkpoint of an earlier version has none
        if confusions is not None:
            confusions = {
                split: Confusion(tuple(found["totals"]), tuple(Mistake(**mistake) for mistake in found["mistakes"]))
                for split, found in confusions.items()
            }
        history = History.from_dict(entries["history"])
        return cls(**entries | accuracies | dict(confusions=confusions, history=history))


def made_now():
    """What a Record notes of the moment at which it is made: {name of the field: value}."""
    return dict(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        python=platform.python_version(),
        torch=torch.__version__,
        tiktoken=tiktoken.__version__,
        pandas=pd.__version__,
    )


def make_record(run, row, configuration, experiment, data, weights, confusions, minutes, state):
    """The Record of a run that finishes now, `state` being its TrainingState."""
    usage = state.usage.so_far()
    return Record(
        run=run,
        **made_now(),
        row=row,
        configuration=configuration,
        settings=asdict(experiment),
        weights_sha256=weights.sha256 or "",
        data=data.name,
        data_sha256=data.sha256,
        tokens_per_message=data.longest,
        **{split: confusion.accuracy for split, confusion in confusions.items()},
        minutes=minutes,
        seconds=usage["total"],
        peak_memory_gb=usage["peak_memory"] / 1e9 or None,
        device_name=describe_devices(state.device),
        confusions=confusions,
        history=state.history,
    )

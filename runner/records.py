"""One finished run: its accuracies with their intervals, and its history."""

import math
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import datetime

import pandas as pd
import tiktoken
import torch

from .dataset import SPLITS
from .devices import describe_device

# --- accuracies ---

Z95 = 1.959963984540054  # the normal distribution has 95% of its mass within this many standard deviations


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` messages classified as labelled; prints as a percentage."""

    correct: float  # a whole number; the mean of several runs need not be
    total: int

    @property
    def fraction(self):
        """correct / total; NaN where nothing was measured."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self):
        """The 95% score interval (low, high) of the fraction (Wilson 1927).

        Unlike p ± 1.96 sqrt(p (1 - p) / n) it stays within 0 and 1, and has a width also where all or none are right.
        """
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.fraction
        center = p + Z95**2 / (2 * n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        low, high = (bound / (1 + Z95**2 / n) for bound in (center - half, center + half))
        return low if p > 0 else 0.0, high if p < 1 else 1.0  # rounding would miss these

    def __str__(self):
        return f"{self.fraction * 100:.2f}%"

    @property
    def bounds(self):
        """The interval in percent: `91.9–96.9`."""
        low, high = self.interval
        return f"{low * 100:.1f}–{high * 100:.1f}"

    @property
    def in_full(self):
        """`95.00% (285/300, 95% interval 91.9–96.9)`."""
        return f"{self} ({self.correct}/{self.total}, 95% interval {self.bounds})"


def mean_and_deviation(values):
    """Mean and sample standard deviation, which of a single value is NaN; both are, where a value is NaN."""
    if any(math.isnan(value) for value in values):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


# --- one finished run ---


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

    @property
    def lengths(self):
        """How many entries each list has, by its name."""
        return {name: len(entries) for name, entries in vars(self).items()}

    def to_dict(self, lengths):
        """The first entries of each list, as many as `lengths` says, as JSON can hold them."""
        lists = {name: entries[: lengths[name]] for name, entries in vars(self).items()}
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
    history: History | None = None  # None: read from a results file, which does not hold it

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
        return cls(**entries | accuracies | dict(history=History.from_dict(entries["history"])))


def make_record(run, row, configuration, experiment, data, weights, accuracies, minutes, state):
    """The Record of a run that finishes now, `state` being its TrainingState."""
    usage = state.usage.so_far()
    return Record(
        run=run,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        row=row,
        configuration=configuration,
        settings=asdict(experiment),
        weights_sha256=weights.sha256 or "",
        data=data.name,
        data_sha256=data.sha256,
        tokens_per_message=data.longest,
        **accuracies,
        minutes=minutes,
        seconds=usage["total"],
        peak_memory_gb=usage["peak_memory"] / 1e9 or None,
        device_name=describe_device(state.device),
        python=platform.python_version(),
        torch=torch.__version__,
        tiktoken=tiktoken.__version__,
        pandas=pd.__version__,
        history=state.history,
    )

"""What a run leaves behind: accuracies with their intervals, rows, records, the report, pictures, files of tensors.

Nothing here knows how training works. What is written to a file is there whole or not at all.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import signal
import statistics
import textwrap
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt_download import FileError, written_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

SPLITS = {"train": "Training", "validation": "Validation", "test": "Test"}

# --- accuracies ---

Z95 = 1.959963984540054  # the normal distribution has 95% of its mass within this many standard deviations


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` messages classified as their label says; prints as a percentage."""

    correct: float  # a whole number; the mean of several runs need not be
    total: int

    @property
    def fraction(self):
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self):
        """The 95% score interval (low, high) of the fraction, after Wilson (1927).

        Unlike p ± 1.96 sqrt(p (1 - p) / n) it stays within 0 and 1, and has a width also where all or none are right.
        """
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.fraction
        center = p + Z95**2 / (2 * n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        low, high = (bound / (1 + Z95**2 / n) for bound in (center - half, center + half))
        return low if p > 0 else 0.0, high if p < 1 else 1.0  # rounding would miss these by a hair

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


def spread(values):
    """Mean and sample standard deviation; of one value that is not defined and NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


# --- rows ---


@dataclass(frozen=True)
class Published:
    """The published figures of a row: accuracies in percent, minutes on an A100."""

    train: float
    validation: float
    test: float
    minutes: float

    def __str__(self):
        return f"{self.train:.2f}% / {self.validation:.2f}% / {self.test:.2f}%, {self.minutes:.2f} min (A100)"


@dataclass(frozen=True)
class Result:
    """The finished run in the table's terms. `row` and `published` are None where the options are no row's."""

    row: int | None
    model_size: str
    weights: str
    position: str
    layers: str
    context: str
    train: Accuracy
    validation: Accuracy
    test: Accuracy
    minutes: float
    device: str
    remarks: str
    published: Published | None

    def cells(self):
        return {
            "Row": self.row or "-",
            "Model": self.model_size,
            "Weights": self.weights,
            "Trainable token position": self.position,
            "Trainable layers": self.layers,
            "Context length": self.context,
            **{f"{name} acc": getattr(self, split) for split, name in SPLITS.items()},
            "Training time": f"{self.minutes:.2f} min",
            "CPU/GPU": self.device,
            "Remarks": self.remarks or "-",
            "Published": self.published or "-",
        }


def markdown_line(cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def markdown_header(result):
    """The two lines that stand above a row to make it a Markdown table."""
    return markdown_line(result.cells()) + "\n" + markdown_line("---" for _ in result.cells())


def markdown_row(result):
    return markdown_line(result.cells().values())


def markdown_mean_row(several):
    """One row for the Results of several seeds: mean ± standard deviation of accuracies and minutes."""
    cells = several[0].cells()
    for split, name in SPLITS.items():
        mean, deviation = spread([getattr(result, split).fraction * 100 for result in several])
        cells[f"{name} acc"] = f"{mean:.2f}% ± {deviation:.2f}"
    mean, deviation = spread([result.minutes for result in several])
    cells["Training time"] = f"{mean:.2f} ± {deviation:.2f} min"
    cells["Remarks"] = f"mean ± standard deviation of {len(several)} seeds"
    return markdown_line(cells.values())


# --- records ---


@contextmanager
def locked(file):
    """Hold an exclusive lock on an open file; it ends with the process, however that ends."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX)
    else:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    try:
        yield
    finally:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)
        else:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def csv_line(cells):
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def append_record(path, record):
    """Append a record, a dict, as one line of a CSV file; a new file gets a header. Returns the Path written to.

    Safe when several processes append at once: one lock, one write, flushed to disk. A file with other columns is
    left as it is; the record then goes to the first of `name-2.csv`, `name-3.csv`, … that has these columns or is
    not there. A record whose `run`, its first column, is in the file already is not written again: a run that was cut
    off between its record and its next checkpoint comes by twice. Raises OSError where nothing can be written, and
    leaves no part.
    """
    header, line = csv_line(record), csv_line(record.values())
    path = beside = Path(path)
    number = 1
    while True:
        with open(beside, "ab+") as file, locked(file):
            file.seek(0)
            content = file.read()
            if content.startswith(header) or not content:
                if b"\n" + csv_line([record["run"]]).rstrip() + b"," not in content:
                    if not content:
                        line = header + line
                    elif not content.endswith(b"\n"):  # an editor's work, or a line that was cut off
                        line = b"\n" + line
                    append_whole(file.fileno(), line, len(content))
                return beside
        number += 1
        beside = path.with_name(f"{path.stem}-{number}{path.suffix}")


def append_whole(descriptor, content, size):
    """Append bytes to a file of `size` bytes, all of them or none."""
    try:
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


@dataclass(frozen=True)
class Run:
    """One record as the report reads it; `row` is None where the run was no row of the table."""

    row: int | None
    configuration: str
    seed: int
    train: Accuracy
    validation: Accuracy
    test: Accuracy
    minutes: float
    device: str


def read_runs(path):
    """The Runs of a file of records, and the numbers of the lines that are none.

    The same seed with the same result on the same device is one run that was made twice: it counts once, or a
    standard deviation would come out too small.

    Raises FileError for a file that is missing or has other columns.
    """
    needed = (
        "row",
        "configuration",
        "seed",
        "minutes",
        "device_name",
        *(f"{split}_{part}" for split in SPLITS for part in ("correct", "total")),
    )
    runs, broken = {}, []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for column in needed:
                if column not in (reader.fieldnames or ()):
                    raise FileError(f"{path} holds no records of runs: column {column} is missing")
            for record in reader:
                try:
                    row = int(record["row"]) if record["row"] else None
                    what = row, record["configuration"], int(record["seed"])
                    accuracies = [Accuracy(int(record[f"{s}_correct"]), int(record[f"{s}_total"])) for s in SPLITS]
                    minutes, device = float(record["minutes"]), record["device_name"]
                    runs.setdefault((what, *accuracies, device), Run(*what, *accuracies, minutes, device))
                except (TypeError, ValueError):  # TypeError: a line that ends early has None in its last columns
                    broken.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return list(runs.values()), broken


# --- the report ---


def mean_accuracy(accuracies):
    """The mean of several runs on the same messages, as if one run had had it: its interval is that of one run.

    More seeds say more about training, nothing more about the messages: their number stays what it is.
    """
    fraction = statistics.fmean(accuracy.fraction for accuracy in accuracies)
    total = min(accuracy.total for accuracy in accuracies)
    return Accuracy(fraction * total, total)


def measured(accuracies):
    """One cell: the mean of several runs, ± their standard deviation, and its interval."""
    deviation = f" ± {spread([a.fraction * 100 for a in accuracies])[1]:.2f}" if len(accuracies) > 1 else ""
    mean = mean_accuracy(accuracies)
    return f"{mean}{deviation} [{mean.bounds}]"


def compare(accuracies, published):
    """What is to be said of a published figure: itself, the difference, and where it lies."""
    mean = mean_accuracy(accuracies)
    low, high = mean.interval
    where = "inside" if low <= published / 100 <= high else "outside"
    difference = round(mean.fraction * 100 - published, 2) + 0.0  # never -0.00
    return f"{published:.2f}, {difference:+.2f}, {where}"


def time_and_devices(runs):
    minutes, deviation = spread([run.minutes for run in runs])
    devices = ", ".join(dict.fromkeys(run.device for run in runs))
    return f"{minutes:.2f}{f' ± {deviation:.2f}' if len(runs) > 1 else ''} min", devices


def other_runs(runs, rows):
    """The runs that are no row of the table, by their configuration."""
    others = {}
    for run in runs:
        if run.row not in rows:
            others.setdefault(run.configuration, []).append(run)
    return others


def report(runs, rows):
    """The table in Markdown, and one of the other runs.

    `rows` maps the number of each row to (its options, the same in words, its Published figures).
    """
    title = ["Row", "Options", "Runs", *(f"{name} acc" for name in SPLITS.values()), "Training time", "CPU/GPU"]
    lines = [markdown_line(title), markdown_line("---" for _ in title)]
    for number, (command, _, published) in rows.items():
        of_row = [run for run in runs if run.row == number]
        cells, (time, devices) = ["missing"] * len(SPLITS), ("missing", "-")
        if of_row:
            cells = [measured([getattr(run, split) for run in of_row]) for split in SPLITS]
            time, devices = time_and_devices(of_row)
        for column, split in enumerate(SPLITS):
            figure = getattr(published, split)
            cells[column] += "; "
            cells[column] += compare([getattr(run, split) for run in of_row], figure) if of_row else f"{figure:.2f}"
        time += f"; {published.minutes:.2f}"
        lines.append(markdown_line([number, f"`{command}`" if command else "-", len(of_row), *cells, time, devices]))
    lines += [
        "",
        "Measured accuracy (of several runs mean ± standard deviation) with its 95% interval; then the published",
        "figure, the difference in points, and whether the published figure lies inside the interval. Times: minutes",
        "measured; published, on an A100.",
    ]
    if others := other_runs(runs, rows):
        title = ["Other runs", *title[2:]]
        lines += ["", markdown_line(title), markdown_line("---" for _ in title)]
        for configuration, alike in others.items():
            cells = [measured([getattr(run, split) for run in alike]) for split in SPLITS]
            lines.append(markdown_line([configuration, len(alike), *cells, *time_and_devices(alike)]))
    return "\n".join(lines)


# --- pictures ---

PICTURES = (".png", ".pdf", ".svg")
# Told apart by colour-blind readers too (Okabe and Ito 2008), and beside that by their line or mark.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


def figure(width, height):
    """An empty matplotlib Figure of so many inches. matplotlib is imported only where a picture is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(picture, path):
    with written_whole(path) as temporary:
        picture.savefig(temporary, format=Path(path).suffix[1:], dpi=150)


def plot_history(path, histories, per_epoch, batch_size):
    """Losses and accuracies of one run or of several seeds over epochs, with an axis in messages seen.

    Each history has steps, train_losses, val_losses and, one per epoch, train_accuracies and val_accuracies;
    `per_epoch` is batches in an epoch.
    """
    picture = figure(7, 6)
    losses, accuracies = picture.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    kinds = (("training", BLUE, "-", "o", "train"), ("validation", ORANGE, "--", "s", "val"))
    for name, colour, line, mark, prefix in kinds:
        for number, history in enumerate(histories):
            label = name if number == 0 else None
            epochs = [(step + 1) / per_epoch for step in history.steps]
            look = dict(color=colour, linestyle=line, label=label, alpha=1 if len(histories) == 1 else 0.6)
            losses.plot(epochs, getattr(history, f"{prefix}_losses"), **look)
            measured = [100 * accuracy.fraction for accuracy in getattr(history, f"{prefix}_accuracies")]
            accuracies.plot(range(1, len(measured) + 1), measured, marker=mark, **look)
    losses.set(ylabel="Loss", ylim=(0, None))
    losses.legend(title=f"{len(histories)} seeds" if len(histories) > 1 else None)
    n_epochs = max(len(history.train_accuracies) for history in histories)
    every = math.ceil(n_epochs / 10)
    accuracies.set(xlabel="Epochs", ylabel="Accuracy (%)", xlim=(0, n_epochs * 1.02))
    accuracies.set_xticks(range(0, n_epochs + 1, every))
    messages = losses.secondary_xaxis(
        "top", functions=(lambda x: x * per_epoch * batch_size, lambda x: x / (per_epoch * batch_size))
    )
    messages.set_xlabel("Messages seen")
    for axes in (losses, accuracies):
        axes.grid(color="0.9")
        axes.spines[["right", "top"]].set_visible(False)
    save_figure(picture, path)


def plot_report(path, runs, rows):
    """Test accuracy of each row with its interval, and the published figure as a mark; below them the other runs."""
    lines = [
        (f"{words}{{}}  {number:2}", [run.test for run in runs if run.row == number], published.test)
        for number, (_, words, published) in rows.items()
    ]
    for configuration, alike in other_runs(runs, rows).items():
        lines.append((f"{configuration}{{}}", [run.test for run in alike], None))
    picture = figure(8, 0.7 + 0.36 * len(lines))
    axes = picture.subplots()
    for height, (_, tests, published) in enumerate(lines):
        if published is not None:
            axes.plot(published, height, "D", color=ORANGE, fillstyle="none", zorder=3)
        if tests:
            mean = mean_accuracy(tests)
            axes.plot([100 * bound for bound in mean.interval], [height, height], color=BLUE, linewidth=2)
            axes.plot(100 * mean.fraction, height, "o", color=BLUE)
        else:
            side, aside = ("right", -8) if published > 85 else ("left", 8)
            look = dict(textcoords="offset points", color=GREY, fontsize=8, va="center", ha=side)
            axes.annotate("missing", (published, height), (aside, 0), **look)
    labels = [label.format(f" (n\u00a0=\u00a0{len(tests)})" if len(tests) > 1 else "") for label, tests, _ in lines]
    labels = [textwrap.fill(label, 60, drop_whitespace=False) for label in labels]
    axes.plot([], [], "D", color=ORANGE, fillstyle="none", label="published")
    axes.plot([], [], "o-", color=BLUE, linewidth=2, label="measured, 95% interval")
    axes.set_yticks(range(len(lines)), labels, fontsize=8)
    axes.set(xlabel="Test accuracy (%)", ylim=(len(lines) - 0.5, -0.5))
    axes.margins(x=0.1)
    axes.grid(axis="x", color="0.9")
    axes.spines[["right", "top", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    picture.legend(loc="outside upper right", ncols=2, frameon=False)
    save_figure(picture, path)


# --- files of tensors: checkpoints and saved classifiers ---

FORMAT = 1


def sha256_of_tensors(tensors, *texts):
    """SHA-256 of tensors with their names, types and shapes, and of texts beside them."""
    sha256 = hashlib.sha256(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha256.update(tensor.detach().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def write_tensors(path, kind, description, tensors):
    """Write tensors by name, and a description that JSON can hold, as a .safetensors file. Raises OSError."""
    description = json.dumps(description)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(kind=kind, format=str(FORMAT), description=description)
    metadata["sha256"] = sha256_of_tensors(tensors, *metadata.values())
    with written_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its word for a full disk and the like
            raise OSError(str(error)) from error


def read_tensors(path, kind):
    """(description, tensors) of a file that `write_tensors` wrote. Nothing in it can run code.

    Raises FileError for a file that is damaged, of another kind or of another version of the format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read as a {kind}: {error}") from None
    if metadata.get("kind") != kind:
        raise FileError(f"{path} is no {kind} of this program")
    if metadata.get("format") != str(FORMAT):
        raise FileError(f"{path} is a {kind} in format {metadata.get('format')}; this program knows format {FORMAT}")
    if sha256_of_tensors(tensors, kind, str(FORMAT), metadata.get("description")) != metadata.get("sha256"):
        raise FileError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    return json.loads(metadata["description"]), tensors


CHECKPOINT = "checkpoint"


def read_checkpoint(path, identity):
    """(state, tensors) of the checkpoint at `path`, or None where there is none.

    `identity` maps what makes a run the same run to its values. Raises FileError that names the first that differs.
    """
    if not Path(path).exists():
        return None
    description, tensors = read_tensors(path, CHECKPOINT)
    for name, value in identity.items():
        if (theirs := description["identity"].get(name)) != value:
            raise FileError(f"{path} is of a run with {name} {theirs}, not {value}")
    return description["state"], tensors


def write_checkpoint(path, identity, state, tensors):
    """Write the state of a run, which JSON can hold, and its tensors. Raises OSError; what was there then stays."""
    write_tensors(path, CHECKPOINT, dict(identity=identity, state=state), tensors)


# --- runs that are cut off ---


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C that ends the run."""

    def __init__(self, number):
        super().__init__()
        self.number = number


class Lifeline:
    """Keeps a run that is cut off: it knows the last moment from which the run can go on, and writes it down.

    What trains hands over a state with `moment()`, (what JSON can hold, tensors), and `tensors()`, those that change in
    updates only. Within `with lifeline:` the signals that end a run raise KeyboardInterrupt or Terminated, but never
    amid an update or the writing of the file. Without a path it keeps nothing and leaves signals as they are.
    """

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __init__(self, path=None, minutes=0.0, identity=None, warn=print):
        self.path, self.minutes, self.identity, self.warn = path, minutes, identity, warn
        self.run_id = uuid.uuid4().hex
        self.circumstances = {}  # that may change the last digits; a run goes on under other ones, and says so
        self.finished = []  # what is kept of each seed that is through, one after another
        self.cut_off = None  # (moment, tensors, circumstances) that the file holds, until training goes on from it
        self.last_trained = {}  # the trained tensors of the last seed in `finished`, where the file has no moment
        self.state = self.moment = None
        self.holding, self.waiting, self.handlers = False, None, {}
        self.written, self.is_ours, self.warning = time.monotonic(), False, None

    # the file

    def load(self):
        """Take up what the file holds, if there is one. Raises FileError for one of another run, or damaged."""
        try:
            found = read_checkpoint(self.path, self.identity)
        except FileError as error:
            raise FileError(f"{error}; --restart overwrites it") from None
        if found is None:
            return
        entries, tensors = found
        self.is_ours, self.run_id, self.finished = True, entries["run_id"], entries["finished"]
        if entries["moment"] is not None:
            self.cut_off = entries["moment"], tensors, entries["circumstances"]
        else:
            self.last_trained = {name: tensor.clone() for name, tensor in tensors.items()}  # out of the memory map

    def take_up(self, state):
        """Bring a state to the moment that the file holds. Returns whether it holds one."""
        if self.cut_off is None:
            return False
        entries, tensors, circumstances = self.cut_off
        for name, value in self.circumstances.items():
            if circumstances[name] != value:
                before = f"{self.path} was begun with {name} {circumstances[name]}"
                self.warn(f"{before} and goes on with {value}: last digits may differ")
        state.restore(entries, tensors)
        self.cut_off = None
        self.hand_over(state)
        return True

    def write(self):
        """Write the last moment down. What cannot be written is told, once, and the run goes on without."""
        moment, tensors = self.moment
        entries = dict(run_id=self.run_id, circumstances=self.circumstances, finished=self.finished, moment=moment)
        try:
            write_checkpoint(self.path, self.identity, entries, tensors | self.state.tensors(moment is not None))
            self.is_ours = True
        except OSError as error:
            warning = f"the checkpoint {self.path} could not be written: {error.strerror or error}"
            if warning != self.warning:
                self.warn(warning)
            self.warning = warning
        self.written = time.monotonic()

    # what training hands over

    @contextmanager
    def update(self, state):
        """Within it the parameters change; after it training is at a moment from which it can go on."""
        with self.held():
            self.moment = None  # an error amid the update leaves none
            yield
            self.hand_over(state)

    def safe(self, state, epoch_ends=False):
        """Training is at a moment from which it can go on. Some of these moments are written down."""
        self.hand_over(state)
        if self.path is not None and (epoch_ends or time.monotonic() - self.written >= 60 * self.minutes):
            with self.held():
                self.write()

    def hand_over(self, state):
        if self.path is not None:
            self.state, self.moment = state, state.moment()

    def finish(self, entry):
        """A seed is through: keep its entry, which JSON can hold, and the trained tensors, but no moment."""
        with self.held():
            self.finished.append(entry)
            if self.path is not None:
                self.moment = None, {}
                self.write()
            self.state = self.moment = None

    # signals

    def __enter__(self):
        for number in self.SIGNALS if self.path is not None else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, kind, error, traceback):
        self.holding = True  # an impatient second signal is late
        if error is not None and self.moment is not None:
            self.write()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.holding:
            self.waiting = number
        else:
            self.interrupt(number)

    def interrupt(self, number):
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    @contextmanager
    def held(self):
        """Signals wait until this is over."""
        self.holding, self.waiting = True, None
        try:
            yield
        finally:
            self.holding = False
        if self.waiting is not None:
            self.interrupt(self.waiting)

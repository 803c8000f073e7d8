"""Pictures: the course of training, and the table with its intervals."""

import math
import textwrap
from pathlib import Path

from runner.files import atomic_write
from runner.results.summary import in_precision, rank
from runner.results.table import describe_settings

# Told apart by colour-blind readers too (Okabe and Ito 2008), and also by their line or mark.
BLUE, ORANGE = "#0072B2", "#D55E00"


def figure(width, height):
    """An empty matplotlib Figure of so many inches. matplotlib is imported only where a picture is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(picture, path):
    """Write a matplotlib Figure in the format of the suffix of `path`, whole or not at all. Raises OSError."""
    with atomic_write(path) as temporary:
        picture.savefig(temporary, format=Path(path).suffix[1:], dpi=150)


def plot_histories(path, records, n_train):
    """Draw losses and accuracies of one run or of several seeds over epochs, with an axis in messages seen.

    `records` are Records with their histories, `n_train` the number of training messages. Raises OSError.
    """
    histories, batch_size = [record.history for record in records], records[0].settings["batch_size"]
    steps_per_epoch = n_train // batch_size  # the last partial batch is dropped
    picture = figure(7, 6)
    losses, accuracies = picture.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    kinds = (("training", BLUE, "-", "o", "train"), ("validation", ORANGE, "--", "s", "val"))
    for name, colour, line, mark, prefix in kinds:
        for number, history in enumerate(histories):
            label = name if number == 0 else None
            epochs = [(step + 1) / steps_per_epoch for step in history.steps]
            style = dict(color=colour, linestyle=line, label=label, alpha=1 if len(histories) == 1 else 0.6)
            losses.plot(epochs, getattr(history, f"{prefix}_losses"), **style)
            measured = [100 * accuracy.fraction for accuracy in getattr(history, f"{prefix}_accuracies")]
            accuracies.plot(range(1, len(measured) + 1), measured, marker=mark, **style)
    losses.set(ylabel="Loss", ylim=(0, None))
    losses.legend(title=f"{len(histories)} seeds" if len(histories) > 1 else None)
    n_epochs = max(len(history.train_accuracies) for history in histories)
    accuracies.set(xlabel="Epochs", ylabel="Accuracy (%)", xlim=(0, n_epochs * 1.02))
    accuracies.set_xticks(range(0, n_epochs + 1, math.ceil(n_epochs / 10)))
    per_epoch = steps_per_epoch * batch_size
    messages = losses.secondary_xaxis("top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch))
    messages.set_xlabel("Messages seen")
    for axes in (losses, accuracies):
        axes.grid(color="0.9")
        axes.spines[["right", "top"]].set_visible(False)
    save_figure(picture, path)


def plot_report(path, standing, rows):
    """Draw the test accuracy of each row that was run, with its interval and the published figure; then the other runs.

    Raises OSError.
    """
    lines = []  # (name, number, Group, published)
    for (number, precision), group in sorted(standing.table.groups.items(), key=rank):
        name = describe_settings(rows[number].options) + in_precision(precision)
        lines.append((name, f"  {number:2}", group, rows[number].test))
    drawn = list(map(id, standing.table.groups.values()))
    lines += [(name, "", group, None) for name, group in standing.groups.items() if id(group) not in drawn]
    height_of_lines = max(len(lines), 1)  # also of a file without a run
    picture = figure(8, 1 + 0.36 * height_of_lines)
    axes = picture.subplots()
    for height, (_, _, group, published) in enumerate(lines):
        if published is not None:
            axes.plot(published, height, "D", color=ORANGE, fillstyle="none", zorder=3)
        mean = group.mean()
        axes.plot([100 * bound for bound in mean.interval], [height, height], color=BLUE, linewidth=2)
        axes.plot(100 * mean.fraction, height, "o", color=BLUE)
    counts = [len(group.records) for _, _, group, _ in lines]
    counts = [f" (n\u00a0=\u00a0{count})" if count > 1 else "" for count in counts]
    labels = [f"{name}{count}{number}" for (name, number, _, _), count in zip(lines, counts)]
    labels = [label.replace("$", r"\$") for label in labels]  # matplotlib's sign for formulas
    labels = [textwrap.fill(label, 60, drop_whitespace=False) for label in labels]
    axes.plot([], [], "D", color=ORANGE, fillstyle="none", label="published")
    axes.plot([], [], "o-", color=BLUE, linewidth=2, label="measured, 95% interval")
    axes.set_yticks(range(len(lines)), labels, fontsize=8)
    axes.set(xlabel="Test accuracy (%)", ylim=(height_of_lines - 0.5, -0.5))
    axes.margins(x=0.1)
    axes.grid(axis="x", color="0.9")
    axes.spines[["right", "top", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    picture.legend(loc="outside upper right", ncols=2, frameon=False)
    save_figure(picture, path)

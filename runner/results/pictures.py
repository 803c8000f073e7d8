"""Pictures: the course of training, and the table with its intervals. They are fit for a paper, in grey too."""

import math
import textwrap
from pathlib import Path

from runner.files import atomic_write
from runner.rows import ROWS
from runner.wording import describe_settings

# Told apart by colour-blind readers too (Okabe and Ito 2008), and also by their line or mark.
BLUE, ORANGE = "#0072B2", "#D55E00"
ONE_COLUMN, TWO_COLUMNS = 3.3, 6.9  # inches of a paper
STYLE = {"font.size": 8, "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True, "grid.color": "0.9"}


def draw(path, width, height, fill):
    """Write a picture of so many inches, which `fill(figure)` draws, in the format of the suffix. Raises OSError."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), atomic_write(path) as temporary:
        picture = Figure(figsize=(width, height), layout="constrained")
        fill(picture)
        picture.savefig(temporary, format=Path(path).suffix[1:], dpi=300)


def plot_histories(path, records, n_train):
    """Draw losses and accuracies of one run or of several seeds over epochs, with an axis in messages seen.

    `records` are Records, `n_train` is the number of training messages. Raises OSError.
    """
    histories, batch_size = [record.history for record in records], records[0].settings["batch_size"]
    steps_per_epoch = n_train // batch_size  # the last partial batch is dropped
    n_epochs = max(len(history.train_accuracies) for history in histories)

    def fill(picture):
        losses, accuracies = picture.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for name, colour, line, mark, prefix in (
            ("training", BLUE, "-", "o", "train"),
            ("validation", ORANGE, "--", "s", "val"),
        ):
            for number, history in enumerate(histories):
                style = dict(color=colour, linestyle=line, linewidth=1, alpha=1 if len(histories) == 1 else 0.6)
                style |= dict(label=name if number == 0 else None, marker=mark, markersize=3)
                epochs = [(step + 1) / steps_per_epoch for step in history.steps]
                losses.plot(epochs, getattr(history, f"{prefix}_losses"), **style | dict(marker=None))
                measured = [100 * accuracy.fraction for accuracy in getattr(history, f"{prefix}_accuracies")]
                accuracies.plot(range(1, len(measured) + 1), measured, **style)
        losses.set(ylabel="Loss", ylim=(0, None))
        losses.legend(title=f"{len(histories)} seeds" if len(histories) > 1 else None, frameon=False)
        n_first = max(accuracy.total for history in histories for accuracy in history.val_accuracies)
        accuracies.set(
            xlabel="Epochs", ylabel=f"Accuracy (%) of the\nfirst {n_first} messages", xlim=(0, n_epochs * 1.02)
        )
        accuracies.set_xticks(range(0, n_epochs + 1, math.ceil(n_epochs / 10)))
        per_epoch = steps_per_epoch * batch_size
        messages = losses.secondary_xaxis("top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch))
        messages.set_xlabel("Messages seen")

    draw(path, ONE_COLUMN, 3.6, fill)


def plot_summary(path, summary):
    """Draw the test accuracy of each Group of a Summary with its interval, its seeds and the published figure.

    Raises OSError.
    """
    lines = []  # (label, Group or None of a heading, published figure or None)
    for table in summary.tables:
        if len(summary.tables) > 1:
            lines.append((f"{'Rows with ' + table.title if table.title else 'The table'}:", None, None))
        for group in table.groups:
            published = None if table.title else ROWS[group.numbers[0]].test
            lines.append((f"{describe_settings(group.options)}  {group.name}", group, published))
    if summary.tables and summary.others:
        lines.append(("Other runs:", None, None))
    lines += [(group.name, group, None) for group in summary.others]
    labels = [textwrap.fill(label, 50).replace("$", r"\$") for label, *_ in lines]  # $ is a formula's sign
    sizes = [label.count("\n") + 1 for label in labels]
    heights = [sum(sizes[:i]) + size / 2 for i, size in enumerate(sizes)]
    seed = dict(marker="|", color="black", linestyle="", markersize=6, markeredgewidth=0.6, zorder=3)
    measured = dict(marker="o", color=BLUE, markersize=4, linewidth=1.5)
    diamond = dict(marker="D", color=ORANGE, linestyle="", fillstyle="none", markersize=5.5, zorder=4)

    def fill(picture):
        axes = picture.subplots()
        for (_, group, published), height in zip(lines, heights, strict=True):
            if group is not None:
                axes.plot(group.interval(), [height, height], **measured | dict(marker=""))
                axes.plot(100 * group.mean().fraction, height, **measured)
                if len(group.records) > 1:
                    axes.plot([100 * one.fraction for one in group.accuracies()], [height] * len(group.records), **seed)
            if published is not None:
                axes.plot(published, height, **diamond)
        axes.plot([], [], label="measured, 95% interval", **measured)
        if any(group is not None and len(group.records) > 1 for _, group, _ in lines):
            axes.plot([], [], label="single seeds", **seed)
        if any(published is not None for *_, published in lines):
            axes.plot([], [], label="published", **diamond)
        axes.set_yticks(heights, labels)
        axes.set(xlabel="Test accuracy (%)", ylim=(max(sum(sizes), 1), 0))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        picture.legend(loc="outside upper right", ncols=3, frameon=False)

    draw(path, TWO_COLUMNS, 0.8 + 0.17 * max(sum(sizes), 1), fill)

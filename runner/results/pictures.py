"""Draw learning curves, and the table with its intervals, for a paper; readable in grayscale too."""

import math
from contextlib import contextmanager
from pathlib import Path

from runner.files import atomic_write
from runner.results.accuracy import Accuracy
from runner.wording import printable

# Color-blind readers can tell these apart (Okabe and Ito 2008); line style or marker differs too.
BLUE, ORANGE = "#0072B2", "#D55E00"
ONE_COLUMN, TWO_COLUMNS = 3.3, 6.9  # inches of a paper
STYLE = {"font.size": 8, "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True, "grid.color": "0.9"}


@contextmanager
def picture(path, width, height):
    """Yield a matplotlib Figure, its size in inches, and write it in the format of the suffix. Raises OSError."""
    import matplotlib  # takes long
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=300)


def plot_histories(path, records, n_train):
    """Draw the losses and accuracies of Records, one for each seed, of `n_train` training messages. Raises OSError."""
    histories, batch_size = [record.history for record in records], records[0].settings["batch_size"]
    steps_per_epoch = n_train // batch_size  # the last partial batch is dropped
    per_epoch, n_epochs = steps_per_epoch * batch_size, len(histories[0].train_accuracies)
    with picture(path, ONE_COLUMN, 3.6) as figure:
        losses, accuracies = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for history in histories:
            epochs = [(step + 1) / steps_per_epoch for step in history.steps]
            training = "training", BLUE, "-", "o", history.train_losses, history.train_accuracies
            validation = "validation", ORANGE, "--", "s", history.val_losses, history.val_accuracies
            for name, colour, line, mark, of_loss, of_accuracy in (training, validation):
                style = dict(color=colour, linestyle=line, linewidth=1, alpha=1 if len(histories) == 1 else 0.6)
                losses.plot(epochs, of_loss, label=name if history is histories[0] else None, **style)
                percentages = [100 * Accuracy(*one).fraction for one in of_accuracy]
                accuracies.plot(range(1, n_epochs + 1), percentages, marker=mark, markersize=3, **style)
        losses.set(ylabel="Loss", ylim=(0, None))
        losses.legend(title=f"{len(histories)} seeds" if len(histories) > 1 else None, frameon=False)
        _, n_first = histories[0].val_accuracies[0]
        accuracies.set(xlabel="Epochs", ylabel=f"Accuracy (%) of the\nfirst {n_first} messages")
        accuracies.set(xlim=(0, n_epochs * 1.02), xticks=range(0, n_epochs + 1, math.ceil(n_epochs / 10)))
        messages = losses.secondary_xaxis("top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch))
        messages.set_xlabel("Messages seen")


def plot_summary(path, summary):
    """Draw the test accuracy of each Group of a Summary, with interval, seeds and published figure. Raises OSError."""
    lines = []  # (label, Group or None of a heading)
    for table in summary.tables:
        lines += [(f"{table.title}:", None)] * (len(summary.tables) > 1)
        lines += [(f"{group.row or ''}  {group.name}".lstrip(), group) for group in table.groups]
    # For matplotlib a $ begins a formula.
    labels = [printable(label if len(label) <= 60 else f"{label[:59]}…").replace("$", r"\$") for label, _ in lines]
    measured = dict(marker="o", color=BLUE, markersize=4, linewidth=1.5, markevery=[1])
    seed = dict(marker="|", color="black", linestyle="", markersize=6, markeredgewidth=0.6)
    diamond = dict(marker="D", color=ORANGE, linestyle="", fillstyle="none", markersize=5.5)
    with picture(path, TWO_COLUMNS, 0.8 + 0.17 * max(len(lines), 1)) as figure:
        axes, drawn = figure.subplots(), {}  # {text of the legend: a line of that kind}
        for height, (_, group) in enumerate(lines):
            if group is None or not group.mean().total:
                continue
            low, high = group.interval
            values = [max(low, summary.low), group.percent(), high]
            [drawn["measured, 95% interval"]] = axes.plot(values, [height] * 3, **measured)
            if low < summary.low:
                axes.plot(summary.low, height, marker="<", color=BLUE, markersize=5, gid="cut")
            if len(group.records) > 1:
                seeds = [100 * one.fraction for one in group.accuracies()]
                [drawn["single seeds"]] = axes.plot(seeds, [height] * len(seeds), **seed)
            if group.published is not None:
                [drawn["published"]] = axes.plot(group.published, height, **diamond)
        axes.set_yticks(range(len(lines)), labels)
        axes.set(xlabel="Test accuracy (%)", ylim=(max(len(lines), 1) - 0.5, -0.5))
        if summary.low:
            axes.set_xlim(summary.low - 0.02 * (100 - summary.low), None)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        figure.legend(drawn.values(), drawn, loc="outside upper right", ncols=3, frameon=False)

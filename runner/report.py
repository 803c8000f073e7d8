"""The table of all runs in a results file next to the published figures, and pictures."""

import math
import statistics
import sys
import textwrap
from pathlib import Path

from .dataset import SPLITS
from .files import atomic_write
from .records import Accuracy, mean_and_deviation
from .results_file import read_records
from .table import command_line, describe_settings, markdown_header, markdown_line


def print_report(path, plot_path, rows):
    """`--report`: print the table from a results file, and draw it if `plot_path` is given.

    `rows` maps the number of each row to its Row. Raises FileError or OSError.
    """
    records, damaged = read_records(path)
    records, disagreements = one_per_seed(records)
    print(report(records, rows))
    if disagreements:
        print("\n" + "\n".join(disagreements))
    if damaged:
        numbers = ", ".join(map(str, damaged[:10])) + (f" and {len(damaged) - 10} more" if len(damaged) > 10 else "")
        print(f"{path}: no complete record on line {numbers}; skipped", file=sys.stderr)
    if plot_path:
        plot_report(plot_path, records, rows)


def configuration_of(record):
    """What runs of the same configuration share: the row, or the options; the precision; the weights file."""
    what = record.row or record.configuration
    return what, record.settings["precision"], record.weights_sha256


def one_per_seed(records):
    """([the first Record of each seed of each configuration], [a line for each seed with different results]).

    A seed that was run again is no further sample of what training varies, on whatever device.
    """
    by_seed = {}
    for record in records:
        by_seed.setdefault((*configuration_of(record), record.seed), []).append(record)
    disagreements = []
    for same in by_seed.values():
        results = {}
        for record in same:
            results.setdefault((record.train, record.validation, record.test), record)
        if len(results) > 1:
            name = f"Row {same[0].row}" if same[0].row else same[0].configuration
            split = next(s for s in reversed(SPLITS) if len({getattr(record, s) for record in results.values()}) > 1)
            found = "; ".join(
                f"{SPLITS[split].lower()} {getattr(record, split)} on {record.device_name}, PyTorch {record.torch}"
                for record in results.values()
            )
            disagreements.append(
                f"{name}, seed {same[0].seed}: results differ by device or version, the first counts: {found}"
            )
    return [same[0] for same in by_seed.values()], disagreements


# --- the table ---


def mean_accuracy(accuracies):
    """The mean of several runs on the same messages as one Accuracy: its interval is that of one run.

    More seeds say more about training, nothing more about the messages: their number stays what it is.
    """
    fraction = statistics.fmean(accuracy.fraction for accuracy in accuracies)
    total = min(accuracy.total for accuracy in accuracies)
    return Accuracy(fraction * total, total)


def describe_measured(accuracies):
    """One cell: the mean of several runs, ± their standard deviation, and its interval."""
    deviation = f" ± {mean_and_deviation([a.fraction * 100 for a in accuracies])[1]:.2f}" if len(accuracies) > 1 else ""
    mean = mean_accuracy(accuracies)
    return f"{mean}{deviation} [{mean.bounds}]"


def compare(accuracies, published):
    """The published figure, the difference from it in points, and whether it lies inside the measured interval."""
    mean = mean_accuracy(accuracies)
    low, high = mean.interval
    where = "inside" if low <= published / 100 <= high else "outside"
    difference = round(mean.fraction * 100 - published, 2) + 0.0  # never -0.00
    return f"{published:.2f}, {difference:+.2f}, {where}"


def minutes_and_devices(records):
    """Two cells: mean minutes ± standard deviation, and the names of the devices."""
    minutes, deviation = mean_and_deviation([record.minutes for record in records])
    devices = ", ".join(dict.fromkeys(record.device_name for record in records))
    return f"{minutes:.2f}{f' ± {deviation:.2f}' if len(records) > 1 else ''} min", devices


def group_by_configuration(records, rows):
    """({number of the row: {precision: [Record, ...]}}, {description of other configurations: [Record, ...]})."""
    of_rows, others, files = {number: {} for number in rows}, {}, {}
    for record in records:
        files.setdefault(record.configuration, set()).add(record.weights_sha256)
    for record in records:
        precision = record.settings["precision"]
        if record.row in rows:
            of_rows[record.row].setdefault(precision, []).append(record)
            continue
        name = record.configuration + in_precision(precision)
        if len(files[record.configuration]) > 1:  # a weights file that was replaced by another one of its name
            name += f", weights {record.weights_sha256[:8]}"
        others.setdefault(name, []).append(record)
    return of_rows, others


def in_precision(precision):
    """What is added to the name of a configuration: nothing for fp32, from which the others are told apart."""
    return "" if precision == "fp32" else f", {precision}"


def report(records, rows):
    """The table in Markdown, and one of the other runs; `rows` maps the number of each row to its Row."""
    titles = ["Row", "Options", "Runs", *(f"{title} acc" for title in SPLITS.values()), "Training time", "CPU/GPU"]
    of_rows, others = group_by_configuration(records, rows)
    lines = [markdown_header(titles)]
    for number, row in rows.items():
        for precision, same in (of_rows[number] or {"fp32": []}).items():
            lines.append(report_line(f"{number}{in_precision(precision)}", row, same))
    lines += [
        "",
        "Measured accuracy (of several runs mean ± standard deviation) with its 95% interval; then the published",
        "figure, the difference in points, and whether the published figure lies inside the interval. Times: minutes",
        "measured; published, on an A100. A seed counts once, however often and on whatever devices it was run.",
    ]
    if others:
        lines += ["", markdown_header(["Other runs", *titles[2:]])]
        for configuration, same in others.items():
            cells = [describe_measured([getattr(record, split) for record in same]) for split in SPLITS]
            lines.append(markdown_line([configuration, len(same), *cells, *minutes_and_devices(same)]))
    return "\n".join(lines)


def report_line(name, row, records):
    """The line of one row of the table, from the records of its runs."""
    cells = []
    for split in SPLITS:
        published, accuracies = getattr(row, split), [getattr(record, split) for record in records]
        measured = f"{describe_measured(accuracies)}; {compare(accuracies, published)}" if records else None
        cells.append(measured or f"missing; {published:.2f}")
    minutes, devices = minutes_and_devices(records) if records else ("missing", "-")
    options = f"`{command_line(row.options)}`" if row.options else "-"
    return markdown_line([name, options, len(records), *cells, f"{minutes}; {row.minutes:.2f}", devices])


# --- pictures ---

# Told apart by colour-blind readers too (Okabe and Ito 2008), and also by their line or mark.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


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


def plot_report(path, records, rows):
    """Draw the test accuracy of each row with its interval and the published figure, below them the other runs.

    Raises OSError.
    """
    of_rows, others = group_by_configuration(records, rows)
    lines = []  # (name, number, accuracies, published)
    for number, row in rows.items():
        for precision, same in (of_rows[number] or {"fp32": []}).items():
            name = describe_settings(row.options) + in_precision(precision)
            lines.append((name, f"  {number:2}", [record.test for record in same], row.test))
    lines += [(name, "", [record.test for record in same], None) for name, same in others.items()]
    picture = figure(8, 0.7 + 0.36 * len(lines))
    axes = picture.subplots()
    for height, (_, _, tests, published) in enumerate(lines):
        if published is not None:
            axes.plot(published, height, "D", color=ORANGE, fillstyle="none", zorder=3)
        if tests:
            mean = mean_accuracy(tests)
            axes.plot([100 * bound for bound in mean.interval], [height, height], color=BLUE, linewidth=2)
            axes.plot(100 * mean.fraction, height, "o", color=BLUE)
        else:
            side, offset = ("right", -8) if published > 85 else ("left", 8)
            style = dict(textcoords="offset points", color=GREY, fontsize=8, va="center", ha=side)
            axes.annotate("missing", (published, height), (offset, 0), **style)
    counts = [f" (n\u00a0=\u00a0{len(tests)})" if len(tests) > 1 else "" for _, _, tests, _ in lines]
    labels = [f"{name}{count}{number}" for (name, number, _, _), count in zip(lines, counts)]
    labels = [label.replace("$", r"\$") for label in labels]  # matplotlib's sign for formulas
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

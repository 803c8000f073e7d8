"""The report as a page for a browser: one file, nothing fetched, made from `page.html`, which escapes all texts."""

import math
from pathlib import Path

import jinja2
from markupsafe import Markup

from runner.results.summary import NOTE


def render(summary):
    """The page of a Summary as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    groups = [group for table in summary.tables for group in table.groups]
    ends = [end for group in groups for end in (group.interval[0], group.published) if end is not None]
    low = 5 * int(min(ends, default=50) // 5)
    return environment.get_template("page.html").render(
        note=NOTE,
        low=low,
        tables=[(table, table_lines(table, low), answer_lines(table)) for table in summary.tables],
        remarks=summary.remarks,
        runs=[(record, curves(record.history), mistake_lines(record)) for record in summary.records],
    )


def table_lines(table, low):
    """A line, {title: text}, for each Group of a Table, with a drawing from `low` to 100%."""
    lines = table.cells.to_dict("records")
    for line, group in zip(lines, table.groups, strict=True):
        seeds = [100 * accuracy.fraction for accuracy in group.accuracies()]
        values = dict(tick=range(low, 101, 5), seed=seeds, mean=[group.percent()], published=[group.published])
        line["Test"] += drawing(low, 100, group.interval, values)
    return lines


def answer_lines(table):
    """A line for each answer of a Table."""
    widest, lines = max([0.05, *(abs(end) for found in table.answers.values() for end in found.interval)]), []
    for question, found in table.answers.items():
        drawn = drawing(-widest, widest, found.interval, dict(rule=[0], mean=[found.difference]))
        asked = Markup("{} <small>{}</small>").format(question.asks, question.why)
        lines.append(dict(Rows=question.rows, Question=asked, Answer=found.sentence + drawn))
    return lines


def mistake_lines(record):
    """A line for each of the most confident test mistakes of a Record."""
    names, lines = record.class_names, []
    for mistake, text in zip(record.confusions["test"].most_confident(len(record.texts)), record.texts, strict=True):
        line = dict(Message=mistake.index, Confidence=f"{mistake.confidence:.3f}", Predicted=names[mistake.predicted])
        lines.append(line | dict(Labelled=names[mistake.label], Text=text[:200]))
    return lines


MEAN, PUBLISHED = "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "m0-7l6 7-6 7-6-7z"  # a disc and a diamond
MARKS = dict(tick="m0 7v3", rule="m0-10v20", seed="m0-5v10", mean=MEAN, published=PUBLISHED)


def drawing(low, high, interval, values):
    """An interval on a scale from low to high, with marks at values, {kind of mark: values}; None and NaN have none."""

    def at(value):
        return f"M{200 * (value - low) / (high - low):.1f} 10"

    drawn = f'<path class="interval" d="{at(interval[0])}L{at(interval[1])[1:]}"/>'
    for kind in values:
        for value in values[kind]:
            if value is not None and not math.isnan(value):
                drawn += f'<path class="{kind}" d="{at(value)}{MARKS[kind]}"/>'
    return Markup(f'<svg width="200" height="20" viewBox="0 0 200 20" aria-hidden="true">{drawn}</svg>')


def curves(history):
    """The losses over the batches, and what the corners stand for; nothing of fewer than two."""
    if len(history.steps) < 2:
        return ""
    losses, last = dict(training=history.train_losses, validation=history.val_losses), history.steps[-1]
    known = {name: [(x, y) for x, y in zip(history.steps, losses[name]) if not math.isnan(y)] for name in losses}
    drawn, top = "", max((y for points in known.values() for _, y in points), default=0) or 1
    for name, values in known.items():
        points = (f"{300 * step / last:.0f},{110 - 110 * loss / top:.0f}" for step, loss in values)
        drawn += f'<polyline class="{name}" points="{" ".join(points)}"/>'
    drawn = f'<svg width="300" height="110" role="img" aria-label="Losses"><path d="M0 110h300"/>{drawn}</svg>'
    words = f"Loss, 0 to {top:.2f}, over {last:,} batches: training —, validation - -"
    return Markup(f'{drawn}<p class="soft">{words}</p>')

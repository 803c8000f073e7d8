"""The report as a page for a browser: one file, nothing fetched, made from `page.html`, which escapes all texts."""

import math
from pathlib import Path

import jinja2
from markupsafe import Markup


def render(summary):
    """Return the page of a Summary as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    low = 5 * int(summary.low // 5)
    return environment.get_template("page.html").render(
        note=summary.note,
        legend=legend(summary),
        tables=[(table, table_lines(table, low), answer_lines(table)) for table in summary.tables],
        remarks=summary.remarks,
        runs=[
            (record, curves(record.history), class_lines(record), mistake_lines(record)) for record in summary.records
        ],
    )


def legend(summary):
    """Return a line on what the drawings of the tables show."""
    groups = [group for table in summary.tables for group in table.groups]
    words = ["mean (disc)", "95% interval (bar)"]
    words += ["seeds (strokes)"] * any(len(group.records) > 1 for group in groups)
    words += ["published (diamond)"] * any(group.published is not None for group in groups)
    return f"Drawn: {', '.join(words)}, with a tick every 5%."


def table_lines(table, low):
    """Return a line, {title: text}, for each Group of a Table, with a drawing from `low` to 100%."""
    lines = table.cells.to_dict("records")
    for line, group in zip(lines, table.groups, strict=True):
        if not group.mean().total:
            continue
        seeds = [100 * one.fraction for one in group.accuracies()] if len(group.records) > 1 else []
        values = dict(tick=range(low, 101, 5), seed=seeds, mean=[group.percent()])
        values |= dict(published=[group.published]) if group.published is not None else {}
        line["Test"] += drawing({low: f"{low}", 100: "100%"}, group.interval, values)
    return lines


def answer_lines(table):
    """Return a line for each answer of a Table, with a drawing of the interval in points."""
    widest = max([5, *(math.ceil(100 * abs(end)) for answer in table.answers for end in answer.found.interval)])
    labels, lines = {-widest: f"{widest} points worse", 0: "0", widest: f"{widest} better"}, []
    for answer in table.answers:
        found = answer.found
        interval = [100 * end for end in found.interval]
        drawn = drawing(labels, interval, dict(rule=[0], mean=[100 * found.difference]))
        lines.append(dict(Rows=answer.rows, Question=answer.asks, Answer=answer.sentence + drawn))
    return lines


def class_lines(record):
    """Return a line for each class: precision and recall on the test messages."""
    confusion = record.confusions["test"]
    classes = zip(record.class_names, confusion.totals, confusion.precision_and_recall, strict=True)
    return [{"Class": name, "Messages": n, "Precision": p, "Recall": r} for name, n, (p, r) in classes]


def mistake_lines(record):
    """Return a line for each of the most confident test mistakes of a Record."""
    names, lines = record.class_names, []
    for mistake, text in zip(record.confusions["test"].most_confident(len(record.texts)), record.texts):
        line = dict(Message=mistake.index, Confidence=f"{mistake.confidence:.3f}", Predicted=names[mistake.predicted])
        lines.append(line | dict(Label=names[mistake.label], Text=text[:200]))
    return lines


MEAN, PUBLISHED = "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "m0-7l6 7-6 7-6-7z"  # a disc and a diamond
MARKS = dict(tick="m0 7v3", rule="m0-10v20", seed="m0-5v10", mean=MEAN, published=PUBLISHED, cut="m6-5l-6 5 6 5")


def drawing(labels, interval, values):
    """Return a drawing of an interval on a scale, with marks at values, {kind of mark: values}.

    `labels` are {value: text}, of which the first and the last are the ends of the scale. An interval that begins below
    the scale is cut, with an arrow.
    """
    low, *_, high = labels

    def at(value):
        return round(200 * (value - low) / (high - low), 1)

    begin, end = max(interval[0], low), interval[1]
    drawn = f'<path class="interval" d="M{at(begin)} 10L{at(end)} 10"/>'
    for kind, places in (values | dict(cut=[low] * (interval[0] < low))).items():
        for value in places:
            drawn += f'<path class="{kind}" d="M{at(value)} 10{MARKS[kind]}"/>'
    for value, text in labels.items():
        anchor = {low: "start", high: "end"}.get(value, "middle")
        drawn += f'<text x="{at(value)}" y="30" text-anchor="{anchor}">{text}</text>'
    return Markup(f'<svg width="200" height="32" viewBox="0 0 200 32" aria-hidden="true">{drawn}</svg>')


def curves(history):
    """Return a drawing of the losses over the batches, with values at the axes; "" for fewer than two losses."""
    if len(history.steps) < 2:
        return ""
    losses, last = dict(training=history.train_losses, validation=history.val_losses), history.steps[-1]
    known = {name: [(x, y) for x, y in zip(history.steps, losses[name]) if not math.isnan(y)] for name in losses}
    drawn, top = "", max((y for points in known.values() for _, y in points), default=0) or 1
    for name, points in known.items():
        places = (f"{40 + 300 * step / last:.0f},{118 - 110 * loss / top:.0f}" for step, loss in points)
        drawn += f'<polyline class="{name}" points="{" ".join(places)}"/>'
    labels = (36, 12, f"{top:.2f}"), (36, 120, "0"), (46, 132, "0"), (340, 132, f"{last:,} batches")
    drawn += "".join(f'<text x="{x}" y="{y}" text-anchor="end">{text}</text>' for x, y, text in labels)
    drawn = f'<svg width="344" height="134" role="img" aria-label="Losses"><path d="M40 8v110h300"/>{drawn}</svg>'
    return Markup(f'{drawn}<p class="soft">Loss in training — and validation - -</p>')

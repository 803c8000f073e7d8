"""The report as a page for a browser: one file, nothing fetched, made from `page.html`, which escapes all texts."""

import math
from collections import Counter
from datetime import datetime
from pathlib import Path

import jinja2

from runner.results.comparison import P_DECIDES
from runner.rows import ROWS
from runner.wording import command_line, describe_settings

MAX_OTHERS = 300  # lines of other runs
MAX_TEXT = 200  # letters of a message
DETAIL_BYTES = 600_000  # for single runs; those after that are counted, not shown


def render(summary):
    """The page of a Summary as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= dict(rows=ROWS, describe=describe_settings, command_line=command_line, p_decides=P_DECIDES)
    groups = summary.groups
    compared = [answer.comparison for table in summary.tables for answer in table.answers if answer.comparison]
    runs, n_hidden = run_views(groups)
    low = min([group.interval()[0] for group in groups.values()], default=50)
    if summary.tables and not summary.tables[0].title:
        low = min(low, *(row.test for row in ROWS.values()))
    return environment.get_template("page.html").render(
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        summary=summary,
        n_configurations=len(groups),
        others=summary.others[:MAX_OTHERS],
        remarks=summary.remarks[:MAX_OTHERS],
        low=5 * (low // 5),
        spread=max([5.0, *(100 * abs(end) for found in compared for end in found.interval)]),
        runs=runs,
        n_hidden=n_hidden,
        places=Counter((r.device_name, r.torch, r.python) for r in summary.records).most_common(MAX_OTHERS),
    )


def run_views(groups):
    """([what the page shows of a run, ...] as long as there is room, how many there is none for)."""
    views, size, n = [], 0, 0
    for name, group in groups.items():
        for record in group.records:
            n += 1
            if size < DETAIL_BYTES:
                views.append(run_view(name, record))
                size += 1_000 + 2 * len(str(views[-1]))  # about what the template makes of it
    return views, n - len(views)


def run_view(name, record):
    """What the page shows of one run: its course, its errors, its most confident mistakes with their texts."""
    confusion = record.confusions["test"]
    mistakes = [mistake for mistake in confusion.most_confident(len(record.texts)) if mistake.number in record.texts]
    return dict(
        name=name if record.seed is None else f"{name}, seed {record.seed}",
        record=record,
        curves=curves(record.history),
        errors=confusion.describe(record.class_names),
        mistakes=[
            dict(
                number=mistake.number,
                confidence=f"{mistake.confidence:.3f}",
                called=record.class_names[mistake.called],
                label=record.class_names[mistake.label],
                text=record.texts[mistake.number][:MAX_TEXT],
            )
            for mistake in mistakes
        ],
    )


def curves(history, width=300, height=110):
    """Points of the losses in a picture of this size, and what its corners stand for; None of fewer than two."""
    losses = dict(training=history.train_losses, validation=history.val_losses)
    if len(history.steps) < 2 or not math.isfinite(sum(map(sum, losses.values()))) or not history.steps[-1]:
        return None
    top, last = max(map(max, losses.values())) or 1.0, history.steps[-1]
    points = {
        name: " ".join(
            f"{width * step / last:.0f},{height - height * loss / top:.0f}"
            for step, loss in zip(history.steps, values, strict=True)
        )
        for name, values in losses.items()
    }
    return dict(lines=points, top=f"{top:.2f}", last=f"{last:,}", width=width, height=height)

"""The report as a page for a browser: one file, nothing fetched, made from `page.html`, which escapes all texts."""

from collections import Counter
from datetime import datetime
from pathlib import Path

import jinja2

from runner.results.comparison import P_DECIDES
from runner.rows import ROWS
from runner.wording import command_line, describe_settings

MAX_LINES = 300  # of other runs, of single runs, of remarks
MAX_TEXT = 200  # letters of a message


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
    groups, records = summary.groups, summary.records
    compared = [answer.comparison for table in summary.tables for answer in table.answers if answer.comparison]
    runs = [(name, record) for name, group in groups.items() for record in group.records]
    published = [row.test for row in ROWS.values() if summary.tables and not summary.tables[0].title]
    low = min([*published, *(group.interval[0] for group in groups.values())], default=50)
    return environment.get_template("page.html").render(
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        summary=summary,
        n_configurations=len(groups),
        n_runs=len(runs),
        max_lines=MAX_LINES,
        low=5 * (low // 5),
        spread=max([5.0, *(100 * abs(end) for found in compared for end in found.interval)]),
        runs=[run_view(*run) for run in runs[:MAX_LINES]],
        places=Counter((r.device_name, r.torch, r.python) for r in records).most_common(MAX_LINES),
    )


def run_view(name, record):
    """What the page shows of one run: its course, its errors, its most confident mistakes with their texts."""
    confusion, names = record.confusions["test"], record.class_names
    return dict(
        name=name if record.is_baseline else f"{name}, seed {record.seed}",
        record=record,
        curves=curves(record.history),
        errors=confusion.describe(names),
        mistakes=[
            dict(
                number=mistake.number,
                confidence=f"{mistake.confidence:.3f}",
                called=names[mistake.called],
                label=names[mistake.label],
                text=record.texts[mistake.number][:MAX_TEXT],
            )
            for mistake in confusion.most_confident(len(record.texts))
        ],
    )


def curves(history, width=300, height=110):
    """Points of the losses in a picture of this size, and what its corners stand for; None of fewer than two."""
    if len(history.steps) < 2:
        return None
    losses = dict(training=history.train_losses, validation=history.val_losses)
    top, last = max(map(max, losses.values())), history.steps[-1]
    points = {
        name: " ".join(
            f"{width * step / last:.0f},{height - height * loss / top:.0f}"
            for step, loss in zip(history.steps, values, strict=True)
        )
        for name, values in losses.items()
    }
    return dict(lines=points, top=f"{top:.2f}", last=f"{last:,}", width=width, height=height)

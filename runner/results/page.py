"""The report as a page for a browser: one file, nothing fetched, made from `page.html`, which escapes all texts."""

from collections import Counter
from datetime import datetime
from pathlib import Path

import jinja2

from runner.results.comparison import P_DECIDES
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
    environment.globals |= dict(describe=describe_settings, command_line=command_line, curves=curves)
    groups = summary.groups
    ends = [end for group in groups.values() for end in (group.interval[0], group.published) if end is not None]
    differences = [end for table in summary.tables for found in table.answers.values() for end in found.interval]
    return environment.get_template("page.html").render(
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        summary=summary,
        p_decides=P_DECIDES,
        n_configurations=len(groups),
        max_lines=MAX_LINES,
        max_text=MAX_TEXT,
        low=5 * (min(ends, default=50) // 5),
        spread=max([0.05, *map(abs, differences)]),
        runs=[(name, record) for name, group in groups.items() for record in group.records],
        places=Counter((r.device_name, r.torch, r.python) for r in summary.records).most_common(MAX_LINES),
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

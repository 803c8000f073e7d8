"""The report as a page for a browser: one file, nothing fetched, made from `report.html`."""

import math
from datetime import datetime
from pathlib import Path

import jinja2

from runner.data import datasets
from runner.data.datasets import SPLITS
from runner.files import UserError, write_bytes
from runner.results.comparison import holm
from runner.results.summary import compare_groups, in_precision, options_in, rank
from runner.results.table import command_line, describe_settings
from runner.results.wording import against_published, describe, in_ranges, minutes_cell, p_value, runs, unanswered

MAX_GROUPS = 30  # in the matrix: each with each of the others
MAX_OTHERS = 300  # lines of the table of other runs
MAX_MISTAKES, MAX_TEXT = 10, 200  # of a run, and letters of a message
DETAIL_BYTES = 600_000  # for single runs; those after that are counted, not shown


def write_page(path, standing, answers, rows):
    """Write the page of a Standing and its Answers; `rows` maps numbers to Rows. Raises OSError."""
    write_bytes(path, render(standing, answers, rows).encode())


def render(standing, answers, rows):
    """The page as text. All texts are escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("page.html")
    groups = standing.groups
    asked = [question_view(answer, rows) for answer in answers if answer.comparison]
    shown, n_hidden = run_views(groups)
    return template.render(
        title="What each design choice is worth",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        n_runs=sum(len(group.records) for group in groups.values()),
        tables=[table_view(table, standing, rows) for table in standing.tables],
        others=[group_view(group.name, group) for group in standing.others[:MAX_OTHERS]],
        n_others=len(standing.others),
        conclusions=[(table.title, [view for view in asked if view["table"] is table]) for table in standing.tables],
        spread=max([5.0, *(abs(end) for view in asked for end in (view["low"], view["high"]))]),
        unanswered=unanswered_views(answers, standing.tables),
        matrix=matrix_view(dict(sorted(groups.items(), key=lambda item: not item[1].is_baseline)[:MAX_GROUPS])),
        n_groups=len(groups),
        runs=shown,
        n_hidden=n_hidden,
        environments=environments(groups)[:MAX_OTHERS],
        disagreements=standing.disagreements[:MAX_OTHERS],
        scale=scale(groups, rows if standing.table.groups else {}),
    )


# --- the table ---


def scale(groups, rows):
    """(low, high) of the accuracies that are drawn, in percent, with some air."""
    lows = [100 * group.mean().interval[0] for group in groups.values() if group.mean().total]
    lows += [row.test for row in rows.values()]
    return (5 * (min(lows, default=50) // 5), 100)


def group_view(name, group):
    """What the page shows of a Group in a line of a table."""
    mean = group.mean()
    return dict(
        name=name,
        n=len(group.records),
        accuracies={split: group.mean(split) for split in SPLITS},
        low=100 * mean.interval[0],
        high=100 * mean.interval[1],
        test=100 * mean.fraction if mean.total else None,
        deviation=group.deviation() if len(group.records) > 1 else None,
        minutes=minutes_cell(group),
        seconds=group.minutes[0],
    )


def table_view(table, standing, rows):
    """What the page shows of a Table: its lines, the rows that are missing, the baselines on the same data."""
    lines = []
    for (number, precision), group in sorted(table.groups.items(), key=rank):
        options = options_in(table, rows[number])
        line = group_view(f"{number}{in_precision(precision)}", group)
        line |= dict(number=number, options=command_line(options), words=describe_settings(options), published=None)
        if (first := table.first_with(group)) != number:
            line |= dict(options="", words=f"as row {first}")
        if not table.title:
            line |= dict(published=rows[number].test, against=against_published(group.mean(), rows[number].test))
        lines.append(line)
    data = next(iter(table.groups.values())).records[0].data_sha256
    baselines = [
        dict(name=group.name, test=100 * group.mean().fraction)
        for group in standing.others
        if group.is_baseline and group.records[0].data_sha256 == data
    ]
    missing = [number for number in rows if table.group(number) is None]
    return dict(title=table.title, lines=lines, missing=in_ranges(missing), baselines=baselines)


# --- conclusions ---


def question_view(answer, rows):
    """What the page shows of an Answer that has a comparison."""
    question, comparison = answer.question, answer.comparison
    published = [rows[number].test for number in (question.a, question.b)]
    return dict(
        pair=f"{question.a}–{question.b}",
        asks=question.asks,
        table=answer.table,
        kind=comparison.kind,
        verdict={"open": "not shown", "identical": "identical predictions"}.get(comparison.kind, comparison.kind),
        limit=comparison.limit if comparison.kind == "open" else "",
        runs=runs(answer) + (f"; {answer.remark}" if answer.remark else ""),
        sentence=describe(answer),
        published=f"{published[0]:.2f} → {published[1]:.2f} ({published[1] - published[0]:+.2f})",
        difference=100 * comparison.difference,
        low=100 * comparison.interval[0],
        high=100 * comparison.interval[1],
        p=p_value(comparison),
        p_value=comparison.p_corrected,
    )


def unanswered_views(answers, tables):
    """[(why, pairs of rows), ...] of the questions without a comparison, with the table where there are several."""
    views = []
    for table in tables:
        for why, pairs in unanswered(answer for answer in answers if answer.table is table).items():
            title = f", with {table.title}" if table.title and len(tables) > 1 else ""
            views.append((why + title, pairs))
    return views


def matrix_view(groups):
    """Names, and for each pair of Groups a cell: how much better the one of the line is than the one of the column."""
    names = list(groups)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    compared = {pair: compare_groups(groups[pair[1]], groups[pair[0]])[0] for pair in pairs}
    found = [pair for pair in pairs if compared[pair]]
    compared |= dict(zip(found, holm([compared[pair] for pair in found]), strict=True))
    cells = {}
    for (a, b), comparison in compared.items():
        for line, column, sign in ((a, b, 1), (b, a, -1)):
            cells[line, column] = None if comparison is None else cell_view(comparison, sign)
    return dict(names=names, cells=cells, n=len(found))


def cell_view(comparison, sign):
    """What the page shows of a Comparison in the matrix; with sign -1 the other way round."""
    low, high = sorted(sign * 100 * end for end in comparison.interval)
    difference = sign * 100 * comparison.difference
    kind = comparison.kind
    if kind in ("better", "worse"):
        kind = "better" if difference > 0 else "worse"
    return dict(
        text=f"{difference + 0.0:+.1f}", kind=kind, title=f"95% {low:+.1f} to {high:+.1f}, p {p_value(comparison)}"
    )


# --- single runs ---


def run_views(groups):
    """([what the page shows of a run, ...] as long as there is room, how many there is none for)."""
    texts, shown, size, n = {}, [], 0, 0
    for name, group in groups.items():
        for record in group.records:
            n += 1
            if size < DETAIL_BYTES:
                shown.append(run_view(name, record, texts))
                size += 1_000 + 2 * len(str(shown[-1]))  # about what the template makes of it
    return shown, n - len(shown)


def run_view(name, record, texts):
    """What the page shows of one run: its course, its errors, its most confident mistakes with their texts."""
    view = dict(
        name=f"{name}, seed {record.seed}" if record.seed != "" else name,
        test=record.test.in_full,
        date=record.date[:10],
        device=record.device_name,
        curves=curves(record.history),
        errors=[],
        mistakes=[],
    )
    if record.confusions is not None:
        confusion = record.confusions["test"]
        names = ["ham", "spam"] if record.data != "own" else [str(label) for label in range(len(confusion.totals))]
        messages = texts_of(record, texts)
        view["errors"] = confusion.describe(names)
        view["mistakes"] = [
            dict(
                number=mistake.number,
                confidence=f"{mistake.confidence:.3f}",
                called=names[mistake.called],
                label=names[mistake.label],
                text=messages[mistake.number][:MAX_TEXT] if mistake.number < len(messages) else None,
            )
            for mistake in confusion.most_confident(MAX_MISTAKES)
        ]
    return view


def texts_of(record, known):
    """The test messages of a run, if its data are still where they were; else none. `known` holds what was read."""
    place = record.data, record.settings.get("data_dir"), record.data_sha256
    if place not in known:
        known[place] = []
        try:
            if record.data == "sample":
                splits, _ = datasets.load_splits("", "sample")
            else:
                folder = Path(str(record.settings.get("data_dir", "")))
                splits = {split: datasets.read_labelled_csv(folder / f"{split}.csv") for split in SPLITS}
            if datasets.sha256_of_splits(splits) == record.data_sha256:
                known[place] = list(splits["test"]["Text"])
        except (UserError, OSError):
            pass
    return known[place]


def curves(history, width=300, height=110):
    """Points of the losses in a picture of this size, and what its corners stand for; None: not known."""
    if history is None or len(history.steps) < 2 or not math.isfinite(sum(history.train_losses + history.val_losses)):
        return None
    top = max(*history.train_losses, *history.val_losses) or 1.0
    last = history.steps[-1]
    lines = {
        name: " ".join(
            f"{width * step / last:.0f},{height - height * loss / top:.0f}"
            for step, loss in zip(history.steps, losses, strict=True)
        )
        for name, losses in (("training", history.train_losses), ("validation", history.val_losses))
    }
    return dict(lines=lines, top=f"{top:.2f}", last=f"{last:,}", width=width, height=height)


def environments(groups):
    """[(device, PyTorch, Python, number of runs), ...]."""
    counts = {}
    for group in groups.values():
        for record in group.records:
            where = record.device_name, record.torch, record.python
            counts[where] = counts.get(where, 0) + 1
    return [(*where, n) for where, n in counts.items()]

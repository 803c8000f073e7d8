"""All runs in order: which are of one configuration, which of these are rows of one table, and what the rows answer."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from runner.results.accuracy import mean_interval
from runner.results.comparison import Sample, compare, holm
from runner.rows import QUESTIONS, ROWS
from runner.wording import describe_settings

NOTE = (
    "Test: accuracy in percent, of n runs the mean, with its 95% interval, which holds the choice of messages and of "
    "seeds. Unseen: without the messages that are, but for case, digits and punctuation, among the training messages. "
    "Conclusions: rows are compared message by message, single runs by the exact McNemar test. The p-value decides, "
    "which is corrected for the number of comparisons; an interval belongs to one comparison alone."
)


@dataclass(frozen=True)
class Group:
    """The runs of one configuration in one precision, one for each seed."""

    records: list  # by date
    name: str  # of the configuration, within its table
    rows: tuple = ()  # numbers: several where the rows differ in nothing but what the table chooses
    published: float | None = None  # test accuracy in percent; None outside the published table

    def accuracies(self, split="test"):
        """The Accuracy of each run; split may be "unseen"."""
        return [getattr(record, split) for record in self.records]

    def percent(self, split="test"):
        return 100 * np.mean([accuracy.fraction for accuracy in self.accuracies(split)])

    @property
    def interval(self):
        """The 95% interval (low, high) of the mean test accuracy, in percent; it holds messages and seeds."""
        return tuple(100 * end for end in mean_interval(self.accuracies()))

    @property
    def cells(self):
        """What a table says of it, {title: text}; "" where there is nothing to say."""
        (low, high), confusions = self.interval, [record.confusions["test"] for record in self.records]
        where = "inside" if low <= (self.published or 0) <= high else "outside"
        return {
            "Row": ", ".join(map(str, self.rows)),
            "Configuration": self.name,
            "n": str(len(self.records)),
            "Test": f"{self.percent():.2f} [{low:.1f}–{high:.1f}]",
            "Unseen": f"{self.percent('unseen'):.2f}",
            "Macro F1": f"{np.mean([c.macro_f1 for c in confusions]):.3f}" if confusions[0].needs_macro_f1 else "",
            "Published": f"{self.published:.2f} {where}" if self.published else "",
            "Validation": f"{self.percent('validation'):.2f}",
            "Training": f"{self.percent('train'):.2f}",
            "Minutes": f"{np.mean([record.minutes for record in self.records]):.2f}",
            "Features": f"{np.mean([record.feature_seconds for record in self.records]):.0f} s",
        }


@dataclass(frozen=True)
class Table:
    """The rows' options with one choice of further options, then baselines on the same data; or all other runs."""

    title: str
    groups: list  # by row
    answers: dict = field(default_factory=dict)  # {Question: Comparison}

    @property
    def rows(self):
        """{number of a row: Group}."""
        return {number: group for group in self.groups for number in group.rows}

    @property
    def cells(self):
        """A DataFrame of the cells of its Groups, without columns that are empty."""
        cells = pd.DataFrame([group.cells for group in self.groups])
        return cells.loc[:, (cells != "").any()]

    @property
    def note(self):
        """What always the most frequent class would reach, if that is much, and which rows were not run: a text."""
        most_frequent, lines = self.groups[0].records[0].confusions["test"].most_frequent, []
        if self.rows and most_frequent.fraction > 0.6:
            lines.append(f"Always the most frequent class: {most_frequent}.")
        if self.rows and (missing := sorted(ROWS.keys() - self.rows)):
            lines.append(f"Not run: rows {', '.join(map(str, missing))}.")
        return " ".join(lines)


class Summary(NamedTuple):
    """All that the folders hold."""

    tables: list  # of Table: the published one, others of rows, all other runs
    remarks: list  # lines: seeds whose runs differ, notes of runs

    @property
    def records(self):
        """Those that count."""
        return [record for table in self.tables for group in table.groups for record in group.records]


MODEL = ("model_size", "weights")
ROW_OPTIONS = {name for row in ROWS.values() for name in row.options} - {*MODEL}


def find_rows(options):
    """(numbers of rows, their options, options of their table) for a run's options.

    Of the rows whose options a run has, it is the one that leaves the fewest options of rows to the table. Model size
    and weights are the table's where they are not the row's; rows that differ in nothing else are then one: at the nano
    size rows 6 to 8 are row 1.
    """
    found = defaultdict(list)
    for number, row in ROWS.items():
        is_same_model = all(options.get(name) == row.options.get(name) for name in MODEL)
        wanted = {name: value for name, value in row.options.items() if is_same_model or name not in MODEL}
        if wanted.items() <= options.items():
            rest = {name: value for name, value in options.items() if name not in wanted}
            found[len(rest.keys() & ROW_OPTIONS), not is_same_model].append((number, wanted, rest))
    best = found[min(found)]
    _, of_rows, of_table = best[0]
    return tuple(number for number, _, rest in best if rest == of_table), of_rows, of_table


def summarize(records):
    """The Summary of Records, which are by date."""
    configurations, tables, baselines = defaultdict(dict), defaultdict(list), defaultdict(list)
    for record in records:
        key = record.name, str(record.options), record.data_sha256
        configurations[key].setdefault(record.seed, []).append(record)
    for seeds in configurations.values():
        kept = [runs[0] for runs in seeds.values()]
        first = kept[0]
        if first.is_baseline:
            baselines[first.data_sha256].append(Group(kept, first.name))
        else:
            precision = {} if first.precision == "fp32" else dict(precision=first.precision)
            rows, of_rows, of_table = find_rows(first.options | precision)
            published = None if of_table else ROWS[rows[0]].test
            title = f"Rows with {describe_settings(of_table)}" if of_table else ""
            tables[title].append(Group(kept, describe_settings(of_rows), rows, published))
    made, others = [], []
    for title, groups in sorted(tables.items()):
        first = groups[0].records[0]
        if title and len(groups) == 1:  # one row is no table
            others.append(Group(groups[0].records, first.name))
        else:
            groups = sorted(groups, key=lambda group: group.rows) + baselines.pop(first.data_sha256, [])
            made.append(Table(title or "The table", groups))
    answer_questions(made)
    others += [group for groups in baselines.values() for group in groups]
    if others:
        made.append(Table("Other runs", others))
    summary = Summary(made, [])
    for runs in (runs for seeds in configurations.values() for runs in seeds.values() if len(runs) > 1):
        results = {}
        for run in runs:
            predictions = [(mistake.index, mistake.predicted) for mistake in run.confusions["test"].mistakes]
            results.setdefault(str(predictions), f"{run.test} on {run.device_name}, PyTorch {run.versions['torch']}")
        if len(results) > 1:
            of_seed = f"{runs[0].name}, seed {runs[0].seed}: mistakes differ, the first run counts"
            summary.remarks.append(f"{of_seed}: test {'; '.join(results.values())}.")
    summary.remarks.extend(f"Note of {record.run}: {record.note}" for record in summary.records if record.note)
    return summary


def answer_questions(tables):
    """Fill in the answers of each Table, with p-values corrected over all of them."""
    for table in tables:
        for question in QUESTIONS:
            a, b = table.rows.get(question.a), table.rows.get(question.b)
            if a and b and a is not b and a.accuracies()[0].total:
                table.answers[question] = compare(*samples_of(a, b))
    tested = [found for table in tables for found in table.answers.values() if found.p is not None]
    for found, p in zip(tested, holm([found.p for found in tested]), strict=True):
        found.p = p


def samples_of(*groups):
    """The Samples of Groups on the same messages; those that all runs got right are alike, and only counted."""
    mistakes = [[record.confusions["test"].mistakes for record in group.records] for group in groups]
    wrong = sorted({mistake.index for runs in mistakes for run in runs for mistake in run})
    samples = []
    for group, runs in zip(groups, mistakes, strict=True):
        predicted = np.full((len(runs), group.accuracies()[0].total), -1)
        for row, run in zip(predicted, runs, strict=True):
            row[np.searchsorted(wrong, [mistake.index for mistake in run])] = [mistake.predicted for mistake in run]
        samples.append(Sample(tuple(record.seed for record in group.records), predicted))
    return samples

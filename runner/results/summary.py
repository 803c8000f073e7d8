"""All runs in order: which are of one configuration, which of these are rows of one table, and what the rows answer."""

import json
import statistics
from dataclasses import dataclass, field

import numpy as np

from runner.data.datasets import SPLITS
from runner.results.accuracy import mean_accuracy, mean_interval
from runner.results.comparison import Sample, compare, holm
from runner.rows import QUESTIONS, ROWS
from runner.wording import describe_settings, in_ranges


@dataclass(frozen=True)
class Group:
    """The runs of one configuration in one precision, one for each seed."""

    records: list  # by date
    numbers: tuple = ()  # of its rows: several, where they differ in nothing but what the table chooses
    options: dict = field(default_factory=dict)  # of these rows
    of_table: dict = field(default_factory=dict)  # options beyond those

    @property
    def name(self):
        """In its table: the numbers of its rows."""
        return in_ranges(self.numbers)

    @property
    def title(self):
        """Without a table."""
        if len(self.numbers) == 1 and not self.of_table.keys() & ROW_OPTIONS:
            return f"row {self.name}, {describe_settings(self.of_table)}"
        first = self.records[0]
        return first.configuration + f", {first.precision}" * (first.precision != "fp32")

    @property
    def published(self):
        """The published test accuracy in percent; None outside the published table."""
        return ROWS[self.numbers[0]].test if self.numbers and not self.of_table else None

    @property
    def where(self):
        """Whether the published test accuracy lies inside the interval."""
        low, high = self.interval
        return "inside" if low <= self.published <= high else "outside"

    def accuracies(self, split="test"):
        """The Accuracy of each run; split may be "unseen"."""
        return [getattr(record, split) for record in self.records]

    def mean(self, split="test"):
        """The mean as an Accuracy."""
        return mean_accuracy(self.accuracies(split))

    @property
    def percent(self):
        """The mean test accuracy in percent."""
        return 100 * self.mean().fraction

    @property
    def interval(self):
        """The 95% interval (low, high) of the mean test accuracy, in percent; it holds messages and seeds."""
        return tuple(100 * end for end in mean_interval(self.accuracies()))

    @property
    def in_full(self):
        """The mean test accuracy with its interval, in percent: `95.33 [92.1–97.3]`."""
        return "{:.2f} [{:.1f}–{:.1f}]".format(self.percent, *self.interval)

    @property
    def macro_f1(self):
        """The mean macro-averaged F1 of the test messages as text; "" where accuracy says enough."""
        confusions = [record.confusions["test"] for record in self.records]
        return f"{statistics.fmean(c.macro_f1 for c in confusions):.3f}" if confusions[0].needs_macro_f1 else ""

    @property
    def minutes(self):
        """Mean minutes of training, of several runs ± their standard deviation."""
        minutes = [record.minutes for record in self.records]
        return f"{np.mean(minutes):.2f}" + (f" ± {np.std(minutes, ddof=1):.2f}" if len(minutes) > 1 else "")

    @property
    def feature_seconds(self):
        """Mean seconds that the frozen features took when they were first computed."""
        return statistics.fmean(record.feature_seconds for record in self.records)


@dataclass
class Table:
    """The rows' options with one choice of further options."""

    title: str  # that choice in words; "" for the published table's own
    groups: list = field(default_factory=list)  # by row
    baselines: list = field(default_factory=list)  # Groups on the same data
    answers: dict = field(default_factory=dict)  # {Question: Comparison}
    not_compared: dict = field(default_factory=dict)  # {why: pairs of rows as text}

    @property
    def below(self):
        """What stands beside the accuracies of the table, and which rows were not run: a text."""
        most_frequent, lines = self.groups[0].records[0].confusions["test"].most_frequent, []
        if most_frequent.fraction > 0.6:
            lines.append(f"Always the most frequent class: {most_frequent}.")
        lines += [f"Baseline: {group.title} {group.in_full}." for group in self.baselines]
        missing = sorted(ROWS.keys() - {number for group in self.groups for number in group.numbers})
        return " ".join(lines + [f"Not run: rows {in_ranges(missing)}."] * bool(missing))


@dataclass(frozen=True)
class Summary:
    """All that the folders hold."""

    tables: list  # of Table, the published one first, if it has runs
    others: list  # of Group
    remarks: list  # lines: seeds whose results differ, notes of runs

    @property
    def groups(self):
        """{name: Group}, those of rows with their table where it is not the published one."""
        found = {}
        for table in self.tables:
            title = f" ({table.title})" if table.title else ""
            found |= {f"row {group.name}{title}": group for group in table.groups}
        return found | {group.title: group for group in self.others}

    @property
    def records(self):
        """Those that count."""
        return [record for group in self.groups.values() for record in group.records]


# --- which run belongs where ---

MODEL = ("model_size", "weights")
ROW_OPTIONS = {name for row in ROWS.values() for name in row.options} - {*MODEL}


def place(options):
    """(numbers of rows, their options, options of their table) for a run's options.

    A run is the row that leaves least to the table. A size or weights that the row does not have are the table's, and
    then rows that differ in nothing else are one: at the nano size rows 6 to 8 are row 1.
    """
    found = {}
    for number, row in ROWS.items():
        is_same_model = all(options.get(name) == row.options.get(name) for name in MODEL)
        wanted = {name: value for name, value in row.options.items() if is_same_model or name not in MODEL}
        if wanted.items() <= options.items():
            rest = {name: value for name, value in options.items() if name not in wanted}
            rank = len(rest.keys() & ROW_OPTIONS), not is_same_model
            found.setdefault(rank, []).append((number, wanted, rest))
    best = found[min(found)]
    _, of_rows, of_table = best[0]
    return tuple(number for number, _, rest in best if rest == of_table), of_rows, of_table


def differences(runs):
    """A line, if the Records of one seed of one configuration made other mistakes: a list."""
    if len(runs) == 1:
        return []
    results = {}
    for record in runs:
        called = [[(m.number, m.called) for m in record.confusions[split].mistakes] for split in SPLITS]
        results.setdefault(str(called), f"{record.test} on {record.device_name}, PyTorch {record.torch}")
    name = f"Row {runs[0].row}" if runs[0].row else runs[0].configuration
    line = f"{name}, seed {runs[0].seed}: mistakes differ, the first counts: test {'; '.join(results.values())}."
    return [line] * (len(results) > 1)


def summarize(records):
    """The Summary of Records, which are by date."""
    configurations, tables, baselines, others, remarks = {}, {"{}": Table("")}, {}, [], []
    for record in records:
        options = record.options | ({} if record.precision == "fp32" else dict(precision=record.precision))
        key = record.is_baseline, record.configuration, json.dumps(options), record.data_sha256
        configurations.setdefault(key, {}).setdefault(record.seed, []).append(record)
    for (is_baseline, _, options, data), seeds in configurations.items():
        kept = [runs[0] for runs in seeds.values()]
        remarks += [line for runs in seeds.values() for line in differences(runs)]
        if is_baseline:
            baselines.setdefault(data, []).append(Group(kept))
        else:
            group = Group(kept, *place(json.loads(options)))
            table = Table(describe_settings(group.of_table))
            tables.setdefault(json.dumps(group.of_table), table).groups.append(group)
    for key, table in tables.items():
        if key != "{}" and len(table.groups) == 1:  # one row is no table
            others.append(table.groups.pop())
        table.groups.sort(key=lambda group: group.numbers)
        table.baselines = baselines.get(table.groups[0].records[0].data_sha256, []) if table.groups else []
    summary = Summary([table for table in tables.values() if table.groups], others, remarks)
    others += sum(baselines.values(), [])
    answer_questions(summary.tables)
    remarks += [f"Note of {record.run}: {record.note}" for record in summary.records if record.note]
    return summary


# --- questions ---


def answer_questions(tables):
    """Fill in the answers of each Table, with p-values corrected over all of them."""
    for table in tables:
        rows = {number: group for group in table.groups for number in group.numbers}
        for question in QUESTIONS:
            a, b = rows.get(question.a), rows.get(question.b)
            why = "not yet run" if a is None or b is None else "the same configuration here" if a is b else ""
            if not why and a.mean().total:
                table.answers[question] = compare(*samples_of(a, b))
            else:
                table.not_compared.setdefault(why or "no message has a label", []).append(question.rows)
    tested = [found for table in tables for found in table.answers.values() if found.p is not None]
    for found, p in zip(tested, holm([found.p for found in tested]), strict=True):
        found.p_corrected = p


def samples_of(*groups):
    """The Samples of Groups on the same messages; those that all runs got right are alike, and only counted."""
    mistakes = [[record.confusions["test"].mistakes for record in group.records] for group in groups]
    wrong = sorted({mistake.number for runs in mistakes for run in runs for mistake in run})
    columns = {number: column for column, number in enumerate(wrong)}
    samples = []
    for group, runs in zip(groups, mistakes, strict=True):
        called = np.full((len(runs), group.mean().total), -1)
        for row, run in zip(called, runs, strict=True):
            for mistake in run:
                row[columns[mistake.number]] = mistake.called
        samples.append(Sample(tuple(record.seed for record in group.records), called))
    return samples

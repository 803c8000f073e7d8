"""All runs in order: which are of one configuration, which of these are rows of one table, and what the rows answer."""

import json
import statistics
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from runner.data.datasets import SPLITS
from runner.results.accuracy import mean_accuracy, mean_interval
from runner.results.comparison import Comparison, Sample, compare, holm
from runner.rows import QUESTIONS, ROWS, Question
from runner.wording import describe_settings, in_ranges, shown


@dataclass(frozen=True)
class Group:
    """The runs of one configuration in one precision, one for each seed."""

    records: list  # by date
    numbers: tuple = ()  # of its rows: several, where they differ in nothing but what the table chooses
    options: dict = field(default_factory=dict)  # of these rows
    of_table: dict = field(default_factory=dict)  # options beyond those

    @property
    def precision(self):
        """Of matrix products."""
        return self.records[0].precision

    @property
    def name(self):
        """In its table: its rows, and the precision unless it is float32."""
        return in_ranges(self.numbers) + f", {self.precision}" * (self.precision != "fp32")

    @property
    def title(self):
        """Without a table."""
        title = self.records[0].configuration
        if len(self.numbers) == 1 and not self.of_table.keys() & ROW_OPTIONS:
            title = f"row {self.numbers[0]}, {describe_settings(self.of_table)}"
        return title + f", {self.precision}" * (self.precision != "fp32")

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

    def where(self, published):
        """Whether a published figure in percent lies inside the interval."""
        low, high = self.interval
        return "inside" if low <= published <= high else "outside"

    @property
    def minutes(self):
        """Mean minutes of training, of several runs ± their standard deviation."""
        minutes = [record.minutes for record in self.records]
        deviation = f" ± {statistics.stdev(minutes):.2f}" if len(minutes) > 1 else ""
        return f"{statistics.fmean(minutes):.2f}{deviation}"

    @property
    def feature_seconds(self):
        """Mean seconds that the frozen features took when they were first computed."""
        return statistics.fmean(record.feature_seconds for record in self.records)

    @property
    def macro_f1(self):
        """The mean macro-averaged F1 of the test messages as text; "" where accuracy says enough."""
        confusions = [record.confusions["test"] for record in self.records]
        return f"{statistics.fmean(c.macro_f1 for c in confusions):.3f}" if confusions[0].needs_macro_f1 else ""


@dataclass
class Answer:
    """What was measured of one Question in one Table."""

    question: Question
    comparison: Comparison | None  # None: not compared
    remark: str  # why not, or what is to be known

    @property
    def p(self):
        """The corrected p-value as text."""
        p = self.comparison.p_corrected
        return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"

    @property
    def basis(self):
        """What was compared."""
        return "; ".join(filter(None, (self.comparison.basis, self.remark)))

    @property
    def sentence(self):
        """What was measured, in a sentence."""
        found = self.comparison
        low, high = (100 * end for end in found.interval)
        words = f"Row {self.question.b}: {found.verdict}"
        if not found.is_identical:
            words += f", {100 * found.difference + 0.0:+.2f} points (95% interval {low:+.1f} to {high:+.1f})"
            words += f", p {'' if '<' in self.p else '= '}{self.p}" if self.p else ""
        return f"{words}; {self.basis}."


@dataclass
class Table:
    """The rows' options with one choice of further options."""

    title: str  # that choice in words; "" for the published table's own
    groups: list = field(default_factory=list)  # by row, float32 first
    baselines: list = field(default_factory=list)  # Groups on the same data
    answers: list = field(default_factory=list)  # one for each of QUESTIONS

    @property
    def below(self):
        """Lines on what stands beside the accuracies of the table, and which rows were not run."""
        most_frequent, lines = self.groups[0].records[0].confusions["test"].most_frequent, []
        if most_frequent.fraction > 0.6:
            lines.append(f"Always the most frequent class: {most_frequent}.")
        lines += [f"Baseline: {shown(group.title)} {group.in_full}." for group in self.baselines]
        missing = sorted(ROWS.keys() - {number for group in self.groups for number in group.numbers})
        return lines + [f"Not run: rows {in_ranges(missing)}."] * bool(missing)

    @property
    def not_compared(self):
        """A line for each reason why questions have no answer."""
        found = {}
        for answer in self.answers:
            if not answer.comparison:
                found.setdefault(answer.remark, []).append(f"{answer.question.a}–{answer.question.b}")
        return [f"Not compared ({why}): {', '.join(pairs)}." for why, pairs in found.items()]

    def pair(self, question):
        """The Groups of a question's two rows, in the same precision if there is one; None where one was not run."""
        a, b = ([group for group in self.groups if number in group.numbers] for number in (question.a, question.b))
        return min(product(a, b), key=lambda pair: pair[0].precision != pair[1].precision, default=(None, None))


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


def one_of_a_seed(runs):
    """(the first of the Records of one seed of one configuration, [a line if they made other mistakes])."""
    first, results = runs[0], {}
    if len(runs) == 1:
        return first, []
    for record in runs:
        called = [[(m.number, m.called) for m in record.confusions[split].mistakes] for split in SPLITS]
        results.setdefault(json.dumps(called), f"{record.test} on {record.device_name}, PyTorch {record.torch}")
    name = f"Row {first.row}" if first.row else first.configuration
    line = f"{name}, seed {first.seed}: mistakes differ, the first counts: test {'; '.join(results.values())}."
    return first, [line] * (len(results) > 1)


def summarize(records):
    """The Summary of Records, which are by date."""
    configurations, tables, baselines, others, remarks = {}, {"{}": Table("")}, {}, [], []
    for record in records:
        key = (record.is_baseline, record.configuration, json.dumps(record.options), record.precision)
        configurations.setdefault((*key, record.data_sha256), {}).setdefault(record.seed, []).append(record)
    for (is_baseline, *_, data), seeds in configurations.items():
        kept, lines = zip(*map(one_of_a_seed, seeds.values()), strict=True)
        remarks += sum(lines, [])
        if is_baseline:
            baselines.setdefault(data, []).append(Group(kept))
        else:
            group = Group(kept, *place(kept[0].options))
            table = Table(describe_settings(group.of_table))
            tables.setdefault(json.dumps(group.of_table), table).groups.append(group)
    for key, table in tables.items():
        if key != "{}" and len({group.numbers for group in table.groups}) == 1:  # one row is no table
            others += table.groups
            table.groups = []
        table.groups.sort(key=lambda group: (group.numbers, group.precision != "fp32", group.precision))
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
        table.answers = [Answer(question, *compare_groups(*table.pair(question))) for question in QUESTIONS]
    compared = [answer.comparison for table in tables for answer in table.answers if answer.comparison]
    tested = [comparison for comparison in compared if comparison.p is not None]
    for comparison, p in zip(tested, holm([comparison.p for comparison in tested]), strict=True):
        comparison.p_corrected = p


def compare_groups(a, b):
    """(the Comparison of two Groups or None, a remark)."""
    if a is None or b is None:
        return None, "not yet run"
    if a is b:
        return None, "the same configuration here"
    if a.records[0].test.total == 0:
        return None, "no message has a label"
    remarks = []
    for word, name in (("on", "device_name"), ("in", "precision")):
        values = dict.fromkeys(getattr(record, name) for record in (*a.records, *b.records))
        remarks += [f"{word} {' and '.join(values)}"] * (len(values) > 1)
    return compare(*samples_of(a, b)), "; ".join(remarks)


def samples_of(*groups):
    """The Samples of Groups on the same messages; those that all runs got right are alike, and only counted."""
    mistakes = [[record.confusions["test"].mistakes for record in group.records] for group in groups]
    wrong = sorted({mistake.number for runs in mistakes for run in runs for mistake in run})
    columns = {number: column for column, number in enumerate(wrong)}
    samples = []
    for group, runs in zip(groups, mistakes, strict=True):
        called = np.full((len(runs), group.records[0].test.total), -1)
        for row, run in zip(called, runs, strict=True):
            for mistake in run:
                row[columns[mistake.number]] = mistake.called
        samples.append(Sample(tuple(record.seed for record in group.records), called))
    return samples

"""All runs in order: which are of one configuration, which of these are rows of one table, and what the rows answer."""

import json
import statistics
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd

from runner.data.datasets import SPLITS
from runner.results.accuracy import Accuracy, mean_and_deviation, mean_interval
from runner.results.comparison import Sample, compare, holm
from runner.results.records import needs_macro_f1
from runner.rows import QUESTIONS, ROWS
from runner.wording import describe_settings, in_ranges, shown


@dataclass(frozen=True)
class Group:
    """The runs of one configuration in one precision, one for each seed."""

    name: str  # in its table: the numbers of its rows; elsewhere the configuration
    options: dict  # of its rows, {name: value}, without those of the table
    numbers: tuple  # of its rows: several, where they differ in nothing but what the table chooses
    precision: str
    records: list  # by date

    def accuracies(self, split="test"):
        """The Accuracy of each run; split may be "unseen"."""
        return [getattr(record, split) for record in self.records]

    def mean(self, split="test"):
        """The mean as an Accuracy, whose own interval does not hold the seeds: see `interval`."""
        found = self.accuracies(split)
        return Accuracy(statistics.fmean(one.fraction for one in found) * found[0].total, found[0].total)

    def interval(self, split="test"):
        """The 95% interval (low, high) of the mean, in percent; it holds messages and seeds."""
        return tuple(100 * end for end in mean_interval(self.accuracies(split)))

    def in_full(self, split="test"):
        """`95.33 [92.1–97.3]`, in percent."""
        return "{:.2f} [{:.1f}–{:.1f}]".format(100 * self.mean(split).fraction, *self.interval(split))

    def where(self, published):
        """Whether a published figure in percent lies inside the interval."""
        low, high = self.interval()
        return "inside" if low <= published <= high else "outside"

    @property
    def minutes(self):
        """Mean minutes of training, of several runs ± their standard deviation."""
        mean, deviation = mean_and_deviation([record.minutes for record in self.records])
        return f"{mean:.2f}{f' ± {deviation:.2f}' if len(self.records) > 1 else ''}"

    @property
    def feature_seconds(self):
        """Mean seconds that the frozen features took when they were first computed."""
        return statistics.fmean(record.feature_seconds for record in self.records)

    @property
    def macro_f1(self):
        """The mean macro-averaged F1 of the test messages, where accuracy alone says little; else None."""
        confusions = [record.confusions["test"] for record in self.records]
        if not needs_macro_f1(confusions[0]):
            return None
        return statistics.fmean(found.macro_f1 for found in confusions)

    @cached_property
    def called(self):
        """Of each run its test mistakes: {number of the message: what it was called}."""
        return tuple({m.number: m.called for m in record.confusions["test"].mistakes} for record in self.records)


@dataclass
class Table:
    """The rows' options with one choice of further options."""

    title: str  # that choice in words; "" for the published table's own
    groups: list = field(default_factory=list)  # by row, float32 first
    baselines: list = field(default_factory=list)  # Groups on the same data
    answers: list = field(default_factory=list)

    @property
    def missing(self):
        """The rows that were not run, `2–5, 7`."""
        return in_ranges(number for number in ROWS if not self.runs_of(number))

    @property
    def below(self):
        """What stands beside the accuracies of the table, and which rows were not run: a line."""
        most_frequent, lines = self.groups[0].records[0].confusions["test"].most_frequent, []
        if most_frequent.fraction > 0.6:
            lines.append(f"Always the most frequent class: {most_frequent}.")
        lines += [f"Baseline: {shown(group.name)} {group.in_full()}." for group in self.baselines]
        return " ".join(lines + [f"Not run: rows {self.missing}."] * bool(self.missing))

    @property
    def not_compared(self):
        """{why: pairs of rows} of the questions without a comparison."""
        found = {}
        for answer in self.answers:
            if not answer.comparison:
                found.setdefault(answer.remark, []).append(f"{answer.question.a}–{answer.question.b}")
        return {why: ", ".join(pairs) for why, pairs in found.items()}

    def runs_of(self, number):
        """The Groups of a row, float32 first."""
        return [group for group in self.groups if number in group.numbers]

    def pair(self, question):
        """The Groups of a question's two rows, in the same precision if there is one; None where one was not run."""
        pairs = [(a, b) for a in self.runs_of(question.a) for b in self.runs_of(question.b)]
        return min(pairs, key=lambda pair: pair[0].precision != pair[1].precision, default=(None, None))


@dataclass(frozen=True)
class Answer:
    """What was measured of one Question in one Table."""

    question: object
    comparison: object | None  # None: not compared
    remark: str  # why not, or what is to be known

    @property
    def verdict(self):
        """The verdict in words."""
        kinds = dict(open="no difference shown", identical="identical predictions", unfit="no verdict")
        return kinds.get(self.comparison.kind, self.comparison.kind)

    @property
    def p(self):
        """The corrected p-value as text."""
        p = self.comparison.p_corrected
        return "" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"

    @property
    def basis(self):
        """What was compared."""
        found = self.comparison
        a, b = found.seeds
        seeds = f"{a} seeds each" if a == b else f"{a} and {b} seeds"
        if found.only is not None:
            seeds = f"one run each, right only in row {self.question.a}: {found.only[0]}"
            seeds += f", only in row {self.question.b}: {found.only[1]}"
        return "; ".join(filter(None, (seeds, found.reason, self.remark)))

    @property
    def sentence(self):
        """What was measured, in a sentence."""
        low, high = (100 * end for end in self.comparison.interval)
        words = f"Row {self.question.b}: {self.verdict}"
        if not self.comparison.is_identical:
            words += f", {100 * self.comparison.difference + 0.0:+.2f} points (95% interval {low:+.1f} to {high:+.1f})"
            words += f", p {self.p}" if self.p else ""
        return f"{words}; {self.basis}."


@dataclass(frozen=True)
class Summary:
    """All that the folders hold."""

    tables: list  # of Table, the published one first, if it has runs
    others: list  # of Group
    records: list  # those that count
    remarks: list  # lines: seeds whose results differ, notes of runs

    @property
    def groups(self):
        """{name: Group}, those of rows with their table where there are several."""
        found = {}
        for table in self.tables:
            title = f" ({table.title})" if table.title else ""
            found |= {f"row {group.name}{title}": group for group in table.groups}
        return found | {group.name: group for group in self.others}


# --- which run belongs where ---

ROW_OPTIONS = {name for row in ROWS.values() for name in row.options} - {"model_size", "weights"}


@lru_cache(None)
def place(options):
    """(numbers of rows, their options, options of their table) for a run's options; all options are JSON.

    A run is the row that leaves least to the table. A size or weights that the row does not have are the table's, and
    then rows that differ in nothing else are one: at the nano size rows 6 to 8 are row 1.
    """
    options, found = json.loads(options), {}
    for number, row in ROWS.items():
        is_same_model = all(options.get(name) == row.options.get(name) for name in ("model_size", "weights"))
        wanted = row.options.items() if is_same_model else row.options.items() - MODEL_ITEMS
        if wanted <= options.items():
            rest = {name: value for name, value in options.items() if (name, value) not in wanted}
            rank = len(rest.keys() & ROW_OPTIONS), not is_same_model
            found.setdefault(rank, []).append((number, dict(sorted(wanted)), rest))
    candidates = found[min(found)]
    _, of_rows, of_table = candidates[0]
    numbers = tuple(number for number, _, rest in candidates if rest == of_table)
    return numbers, {name: options[name] for name in options if name in of_rows}, of_table


MODEL_ITEMS = {item for row in ROWS.values() for item in row.options.items() if item[0] in ("model_size", "weights")}


def called_by(record):
    """What a run called each message, in a form that can be compared."""
    return tuple(tuple((m.number, m.called) for m in record.confusions[split].mistakes) for split in SPLITS)


def same_seed(records):
    """(the first Record of those of one seed of one configuration, a line if their results differ, or None)."""
    results = {}
    for record in records:
        results.setdefault(called_by(record), record)
    if len(results) == 1:
        return records[0], None
    found = "; ".join(f"test {one.test} on {one.device_name}, PyTorch {one.torch}" for one in results.values())
    what = "" if len({one.test for one in results.values()}) > 1 else ", with other mistakes"
    name = f"Row {records[0].row}" if records[0].row else records[0].configuration
    return records[0], f"{name}, seed {records[0].seed}: results differ, the first counts: {found}{what}."


def summarize(records):
    """The Summary of Records, which are by date."""
    frame = pd.DataFrame(dict(record=records), dtype=object)
    for name in ("precision", "data_sha256", "seed", "is_baseline", "configuration"):
        frame[name] = [getattr(record, name) for record in records]
    frame["options"] = [json.dumps(record.options) for record in records]
    same = ["is_baseline", "configuration", "options", "precision", "data_sha256"]
    tables, baselines, counted, remarks = {"{}": Table("")}, {}, [], []
    for (is_baseline, name, options, precision, data), runs in frame.groupby(same, sort=False):
        kept = []
        for _, of_seed in runs.groupby("seed", sort=False, dropna=False):
            record, remark = same_seed(list(of_seed["record"]))
            kept.append(record)
            remarks += [remark] if remark else []
        counted += kept
        if is_baseline:
            baselines.setdefault(data, []).append(Group(name, {}, (), precision, kept))
            continue
        numbers, of_rows, of_table = place(options)
        label = in_ranges(numbers) + ("" if precision == "fp32" else f", {precision}")
        table = tables.setdefault(json.dumps(of_table), Table(describe_settings(of_table)))
        table.groups.append(Group(label, of_rows, numbers, precision, kept))
    others = []
    for key, table in tables.items():
        table.groups.sort(key=lambda group: (group.numbers, group.precision != "fp32", group.precision))
        if key != "{}" and len({group.numbers for group in table.groups}) == 1:  # one row is no table
            others += [named(group, json.loads(key)) for group in table.groups]
            table.groups = []
        elif table.groups:
            table.baselines = baselines.get(table.groups[0].records[0].data_sha256, [])
    shown = [table for table in tables.values() if table.groups]
    answer_questions(shown)
    others += [group for found in baselines.values() for group in found]
    remarks += [f"Note of {record.run}: {record.note}" for record in counted if record.note]
    return Summary(shown, others, counted, remarks)


def named(group, of_table):
    """A Group under the name that it has outside a table."""
    name = group.records[0].configuration
    if len(group.numbers) == 1 and not of_table.keys() & ROW_OPTIONS:
        name = f"row {group.numbers[0]}, {describe_settings(of_table)}"
    precision = "" if group.precision == "fp32" else f", {group.precision}"
    return Group(name + precision, group.options, group.numbers, group.precision, group.records)


# --- questions ---


def answer_questions(tables):
    """Fill in the answers of each Table, with p-values corrected over all of them."""
    for table in tables:
        table.answers = [Answer(question, *compare_groups(*table.pair(question))) for question in QUESTIONS]
    compared = [answer for table in tables for answer in table.answers if answer.comparison]
    corrected = dict(zip(map(id, compared), holm([answer.comparison for answer in compared]), strict=True))
    for table in tables:
        table.answers = [Answer(a.question, corrected.get(id(a)), a.remark) for a in table.answers]


def compare_groups(a, b):
    """(the Comparison of two Groups or None, a remark)."""
    if a is None or b is None:
        return None, "not yet run"
    if a is b:
        return None, "the same configuration here"
    records = [*a.records, *b.records]
    if len({record.data_sha256 for record in records}) > 1 or records[0].test.total == 0:
        return None, "on other messages"
    devices, precisions = dict.fromkeys(r.device_name for r in records), dict.fromkeys(r.precision for r in records)
    remarks = [f"on {' and '.join(devices)}"] * (len(devices) > 1) + [f"in {' and '.join(precisions)}"] * (
        len(precisions) > 1
    )
    return compare(*samples_of(a, b)), "; ".join(remarks)


def samples_of(a, b):
    """The Samples of two Groups on the same messages; those that all runs got right are alike, and only counted."""
    columns = {number: i for i, number in enumerate(sorted(set().union(*a.called, *b.called)))}
    samples = []
    for group in (a, b):
        correct = np.ones((len(group.records), group.records[0].test.total), dtype=bool)
        for run, called in zip(correct, group.called, strict=True):
            run[[columns[number] for number in called]] = False
        samples.append(Sample(tuple(record.seed for record in group.records), correct, group.called))
    return samples

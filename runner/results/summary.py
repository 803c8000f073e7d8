"""Sort all runs into configurations, configurations into tables, and answer the questions that are asked of tables."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from runner.results.accuracy import Accuracy, mean_interval
from runner.results.comparison import (
    LEVEL,
    Comparison,
    MeanVariance,
    Sample,
    compare,
    describe_power,
    holm,
    seed_variances,
)
from runner.rows import QUESTIONS, ROWS
from runner.wording import describe_settings

NO_RUNS = "There are no runs. This command makes one in half a minute: python additional_experiments.py --demo"
ABOUT_TEST = (
    "Test: accuracy in percent, the mean of n runs. The range in brackets is the 95% interval, which allows for other "
    "test messages and, with several runs, other seeds."
)
ABOUT_COLUMNS = {
    "Unseen": "Unseen: the same without test messages that also occur in the training set, ignoring case, digits and "
    "punctuation.",
    "Published": "Published: the original's figure, inside or outside the interval.",
}
ABOUT_ANSWERS = (
    "Conclusions compare rows on the same messages. p is how often chance alone would make such a difference, "
    "corrected for the number of questions. The corrected p-value decides; intervals are not corrected. Better, worse: "
    "p is below 0.05. Probably better, probably worse: the interval excludes zero, but p is not below 0.05. Undecided: "
    "the interval includes zero, and every difference in it is possible; it does not mean that the rows are equal."
)


@dataclass(frozen=True)
class Group:
    """The runs of one configuration in one precision, one for each seed, as a line of a table."""

    records: list  # by date
    name: str  # of the configuration, within its table
    row: int | None = None  # the row that it is in its table
    published: float | None = None  # test accuracy in percent; None outside the published table
    mean_variance: MeanVariance = MeanVariance()  # by seeds

    def accuracies(self, split="test"):
        """Return the Accuracy of each run; split may be "unseen"."""
        return [getattr(record, split) for record in self.records]

    def mean(self, split="test"):
        """Return the mean Accuracy of the runs. Its fraction is rounded once, so equal means are equal numbers."""
        accuracies = self.accuracies(split)
        return Accuracy(sum(one.correct for one in accuracies), sum(one.total for one in accuracies))

    def percent(self, split="test"):
        return 100 * self.mean(split).fraction

    def shown(self, split="test"):
        """Return the mean accuracy for a cell of a table: `95.00` or `n/a`."""
        return str(self.mean(split)).removesuffix("%")

    @property
    def interval(self):
        """Return the 95% interval (low, high) of the mean test accuracy, in percent; it covers messages and seeds."""
        total, n_runs = self.mean(), len(self.records)
        if not total.total:
            return 0.0, 100.0
        mean, [sample] = Accuracy(total.correct / n_runs, total.total // n_runs), samples_of(self)
        return tuple(100 * end for end in mean_interval(mean, self.mean_variance, sample.residual))

    @property
    def cells(self):
        """Return the cells of its line of a table, {title: text}."""
        (low, high), confusions = self.interval, [record.confusions["test"] for record in self.records]
        where = "inside" if low <= (self.published or 0) <= high else "outside"
        return {
            "Row": str(self.row or ""),
            "Configuration": self.name or "-",
            "n": str(len(self.records)),
            "Test": self.shown() + (f" [{low:.1f}–{high:.1f}]" if self.mean().total else ""),
            "Unseen": self.shown("unseen"),
            "Macro F1": f"{np.mean([c.macro_f1 for c in confusions]):.3f}" if confusions[0].needs_macro_f1 else "",
            "Published": f"{self.published:.2f} {where}" if self.published else "",
            "Validation": self.shown("validation"),
            "Training": self.shown("train"),
            "Minutes": f"{np.mean([record.minutes for record in self.records]):.2f}",
            "Features": f"{np.mean([record.feature_seconds for record in self.records]):.0f} s",
        }


class Answer(NamedTuple):
    """A question that is asked of a table, and what was found."""

    rows: str  # "1–16"
    asks: str
    subject: str  # what the verdict is about: "Row 16"
    found: Comparison
    why: str  # why a difference is possible, or ""

    @property
    def sentence(self):
        """Return the answer in words: `Row 16 is 3.33 points better (95% interval ...`, and what may be its reason."""
        verdict = self.found.verdict
        verb = "has" if verdict in ("no verdict", "the same predictions") else "is"
        is_explained = self.why and ("better" in verdict or "worse" in verdict)
        return f"{self.subject} {verb} {self.found.sentence}{f' What differs: {self.why}' if is_explained else ''}"


@dataclass(frozen=True)
class Table:
    """The rows with one choice of further options, then baselines on the same data; or all other runs."""

    title: str
    options: dict  # that all its rows have
    groups: list  # by row
    answers: list = field(default_factory=list)  # of Answer
    remarks: list = field(default_factory=list)  # lines at the head of the conclusions

    @property
    def rows(self):
        """Return {row: Group}."""
        return {group.row: group for group in self.groups if group.row}

    @property
    def cells(self):
        """Return a DataFrame of the cells of its Groups, without columns that are empty."""
        cells = pd.DataFrame([group.cells for group in self.groups])
        return cells.loc[:, (cells != "").any()]

    @property
    def note(self):
        """Return the accuracy of always the most frequent class, if that is high, and which rows were not run."""
        most_frequent, lines = self.groups[0].records[0].confusions["test"].most_frequent, []
        if self.rows and most_frequent.fraction > 0.6:
            lines.append(f"Always the most frequent class: {most_frequent}.")
        possible = [row for row in ROWS if (row, self.options) in places(ROWS[row].options | self.options)]
        if self.rows and (missing := [str(row) for row in possible if row not in self.rows]):
            lines.append(f"Not run: rows {', '.join(missing)}.")
        return " ".join(lines)

    @property
    def best(self):
        """Return the Group of the row that is best in validation, the first of equals; or None."""
        return best_in_validation(self.rows.values())

    @property
    def baseline(self):
        """Return the Group of the baseline that is best in validation; or None."""
        return best_in_validation(group for group in self.groups if group.records[0].is_baseline)


def best_in_validation(groups):
    """Return the first of the Groups with the highest mean validation accuracy; None where none is known."""
    known = [group for group in groups if group.mean("validation").total]
    return max(known, key=lambda group: group.mean("validation").fraction, default=None)


class Summary(NamedTuple):
    """The runs of all folders, as tables."""

    tables: list  # of Table: the published one, others of rows, all other runs
    remarks: list  # lines on repeated runs that differ, and the notes of runs
    records: list  # one for each seed of each configuration

    @property
    def note(self):
        """Return what the columns and the verdicts that it has mean; without a run, the command that makes one."""
        columns = {title for table in self.tables for title in table.cells}
        about = [text for title, text in ABOUT_COLUMNS.items() if title in columns]
        about += [ABOUT_ANSWERS] * any(table.answers for table in self.tables)
        return " ".join([ABOUT_TEST, *about]) if self.tables else NO_RUNS

    @property
    def low(self):
        """Return the beginning of an axis of test accuracies in percent, at most 15 points below the lowest of them.

        An interval that reaches further is cut, so that it does not squeeze the others.
        """
        groups = [group for table in self.tables for group in table.groups if group.mean().total]
        seeds = [100 * seed.fraction for group in groups for seed in group.accuracies()]
        published = [group.published for group in groups if group.published is not None]
        lowest, ends = min(seeds + published, default=0.0), [group.interval[0] for group in groups]
        return max(min([lowest, *ends]), lowest - 15, 0.0)


MODEL = ("model_size", "weights")


def places(options):
    """Return the places of a run with these options, [(row, options of the table), ...].

    The options of a row and those of its table are together the run's. In a table that sets model size or weights, the
    row's own model size or weights do not count: at the medium size LoRA of rank 16 is row 12. If several rows have
    the same other options, such as 1 and 6, the first is meant.
    """
    found = {}
    for number, row in ROWS.items():
        switches = {name: value for name, value in row.options.items() if name not in MODEL}
        for wanted in (row.options, switches):
            table = {name: value for name, value in options.items() if name not in wanted}
            if wanted.items() <= options.items() and row.options.keys() - wanted.keys() <= table.keys():
                found.setdefault(tuple(table), (number, table))
    return list(found.values())


def options_of(record):
    """Return the options of a run that differ from those of row 1, its precision among them."""
    return record.options | (dict(precision=record.precision) if record.precision != "fp32" else {})


def data_of(record):
    """Return what identifies the test messages of a run."""
    return record.data_sha256, tuple(record.confusions["test"].totals)


def key_of(record):
    """Return what identifies the configuration of a run."""
    if record.is_baseline:
        return data_of(record), record.run_id
    return data_of(record), frozenset(options_of(record).items()), record.weights_sha256


def summarize(records):
    """Return the Summary of Records, which are by date."""
    configurations = defaultdict(dict)  # {key: {seed: its runs}}
    for record in records:
        configurations[key_of(record)].setdefault(record.seed, []).append(record)
    counted = [[runs[0] for runs in seeds.values()] for seeds in configurations.values()]
    tables = make_tables(counted)
    in_tables = {id(group.records[0]) for table in tables for group in table.groups}
    if others := [runs for runs in counted if id(runs[0]) not in in_tables]:
        groups = [Group(runs, runs[0].name, mean_variance=seed_variances([fractions(runs)])[0]) for runs in others]
        tables.append(Table("Other runs", {}, groups))
    answer_questions(tables)
    by_id = {id(record): record for table in tables for group in table.groups for record in group.records}
    notes = [f"Note of {record.run_id}: {record.note}" for record in by_id.values() if record.note]
    return Summary(tables, differing_runs(configurations) + notes, list(by_id.values()))


def make_tables(configurations):
    """Return the published Table, if it has a row, then other tables of rows by title, from lists of Records.

    A Table of one row, or whose rows are all in one other Table, is left out.
    """
    found = defaultdict(list)
    for runs in (runs for runs in configurations if not runs[0].is_baseline):
        for row, options in places(options_of(runs[0])):
            weights = runs[0].weights_sha256 if "weights" in options else ""
            found[data_of(runs[0]), frozenset(options.items()), weights].append((row, options, runs))

    def by_size(members):
        return bool(members[0][1]), -len(members), len(members[0][1])

    tables, shown = [], []
    for members in sorted(found.values(), key=by_size):
        options, of_table = members[0][1], {id(runs) for _, _, runs in members}
        if options and (len(members) == 1 or any(of_table <= others for others in shown)):
            continue
        shown.append(of_table)
        members.sort(key=lambda member: member[0])
        groups = []
        for (row, _, runs), variance in zip(members, seed_variances([fractions(runs) for *_, runs in members])):
            of_row = {name: value for name, value in options_of(runs[0]).items() if name not in options}
            published = None if options else ROWS[row].test
            groups.append(Group(runs, describe_settings(of_row, options), row, published, variance))
        for runs in configurations:
            if runs[0].is_baseline and data_of(runs[0]) == data_of(members[0][2][0]):
                groups.append(Group(runs, runs[0].name))
        tables.append(Table(f"Rows with {describe_settings(options)}" if options else "The table", options, groups))
    return sorted(tables, key=lambda table: (bool(table.options), table.title))


def fractions(records):
    """Return the test accuracies of runs as fractions."""
    return [record.test.fraction for record in records]


def differing_runs(configurations):
    """Return a line for each seed that was run more than once with different mistakes."""
    lines = []
    for runs in (runs for seeds in configurations.values() for runs in seeds.values() if len(runs) > 1):
        results = {}
        for run in runs:
            predictions = tuple((mistake.index, mistake.predicted) for mistake in run.confusions["test"].mistakes)
            results.setdefault(predictions, f"{run.test} on {run.device_name}, PyTorch {run.versions.get('torch')}")
        if len(results) > 1:
            of_seed = f"{runs[0].name}, seed {runs[0].seed}: mistakes differ, the first run counts"
            lines.append(f"{of_seed}: test {'; '.join(results.values())}.")
    return lines


def answer_questions(tables):
    """Fill in the answers and remarks of each Table, with p-values corrected for all questions of all tables.

    Two configurations are compared once, in the first table that has both. The same predictions are no question.
    """
    asked = set()
    for table in tables:
        questions = [(table.rows.get(one.a), table.rows.get(one.b), one.rows, one.asks, one) for one in QUESTIONS]
        if (best := table.best) and (baseline := table.baseline):
            asks = f"Does the row that is best in validation beat a linear model ({baseline.name})?"
            questions.append((baseline, best, str(best.row), asks, None))
        for a, b, rows, asks, question in questions:
            if a is None or b is None or not a.mean().total:
                continue
            pair = id(a.records[0]), id(b.records[0])
            if pair not in asked:
                asked.add(pair)
                first = a.records[0]
                is_random = first.options.get("weights") == "random"
                why = question.why(first.data == "uci", is_random) if question else ""
                table.answers.append(Answer(rows, asks, f"Row {b.row}", compare(*samples_of(a, b)), why))
    found = [answer.found for table in tables for answer in table.answers]
    tested = [one for one in found if one.p is not None and not one.is_same]
    for one, p in zip(tested, holm([one.p for one in tested]), strict=True):
        one.p = p
    for table in tables:
        power = describe_power([answer.found for answer in table.answers], LEVEL / max(len(tested), 1))
        table.remarks.extend(filter(None, [power, describe_best(table)]))


def describe_best(table):
    """Return a line on the row with the highest validation accuracy; for a table of one row, ""."""
    best = table.best
    if best is None or len(table.rows) == 1:
        return ""
    cells, highest = best.cells, best.mean("validation").fraction
    equal = [str(row) for row, group in table.rows.items() if group.mean("validation").fraction == highest][1:]
    as_high = f", as high as row{'s' * (len(equal) > 1)} {', '.join(equal)}" if equal else ""
    return (
        f"Which is best? Row {best.row} ({best.name}) has the highest validation accuracy, {cells['Validation']}%"
        f"{as_high}; its test accuracy is {cells['Test']}."
    )


def samples_of(*groups):
    """Return the Samples of Groups on the same messages; those that all runs got right come last, in any order."""
    mistakes = [[record.confusions["test"].mistakes for record in group.records] for group in groups]
    wrong = sorted({mistake.index for runs in mistakes for run in runs for mistake in run})
    samples = []
    for group, runs in zip(groups, mistakes, strict=True):
        predicted = np.full((len(runs), group.records[0].test.total), -1)
        for of_run, run in zip(predicted, runs, strict=True):
            of_run[np.searchsorted(wrong, [mistake.index for mistake in run])] = [mistake.predicted for mistake in run]
        name = f"row {group.row}" if group.row else group.name
        samples.append(Sample(name, tuple(record.seed for record in group.records), predicted, group.mean_variance))
    return samples

"""Records in order: which of them are runs of the same configuration, and of which row of which table."""

import statistics
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from runner.data.datasets import SPLITS
from runner.results.accuracy import Accuracy, mean_and_deviation
from runner.results.comparison import Sample, compare, holm
from runner.results.table import FREE_OPTIONS, describe_settings

# A table is that of the rows' options with one choice of these, which a row's own are then ignored for.
TABLE_OPTIONS = ("model_size", "weights", "dataset", "learning_rate")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration in one precision, one for each seed."""

    name: str  # of the configuration, in words
    records: list  # in the order of the file

    def mean(self, split="test"):
        """The mean accuracy as one Accuracy: its interval is that of one run.

        More seeds say more about training, nothing more about the messages: their number stays what it is.
        """
        accuracies = [getattr(record, split) for record in self.records]
        total = min(accuracy.total for accuracy in accuracies)
        return Accuracy(statistics.fmean(accuracy.fraction for accuracy in accuracies) * total, total)

    def deviation(self, split="test"):
        """The standard deviation between the seeds, in points; NaN of one."""
        return mean_and_deviation([100 * getattr(record, split).fraction for record in self.records])[1]

    @property
    def minutes(self):
        """Mean and standard deviation of the minutes of training."""
        return mean_and_deviation([record.minutes for record in self.records])

    @property
    def devices(self):
        """The names of the devices, each once."""
        return list(dict.fromkeys(record.device_name for record in self.records))

    def joined(self, other):
        """The Group with the seeds of another one that it has not."""
        seeds = {record.seed for record in self.records}
        return Group(self.name, self.records + [record for record in other.records if record.seed not in seeds])

    @property
    def is_baseline(self):
        """Whether its runs are no GPT-2."""
        return self.records[0].settings.get("model_size") == ""

    @cached_property
    def tested(self):
        """The records that hold their mistakes, on the data of the first of them."""
        known = [record for record in self.records if record.confusions is not None]
        return [record for record in known if record.data_sha256 == known[0].data_sha256]

    @cached_property
    def called(self):
        """Of each run that is `tested` its test mistakes: {number of the message: what it was called}."""
        return tuple({m.number: m.called for m in record.confusions["test"].mistakes} for record in self.tested)


@dataclass
class Table:
    """The rows' options with one model size, one kind of weights, one data set and one learning rate."""

    title: str  # "" for the published table's own
    groups: dict = field(default_factory=dict)  # {(number of the row, precision): Group}

    def by_precision(self, number):
        """{precision: Group} of a row, float32 first."""
        return {precision: group for (row, precision), group in sorted(self.groups.items(), key=rank) if row == number}

    def group(self, number):
        """The Group of a row, in float32 if there is one; None: the row was not run."""
        return next(iter(self.by_precision(number).values()), None)

    def pair(self, a, b):
        """The Groups of two rows, in the same precision if there is one."""
        groups_a, groups_b = self.by_precision(a), self.by_precision(b)
        for precision in groups_a:
            if precision in groups_b:
                return groups_a[precision], groups_b[precision]
        return self.group(a), self.group(b)

    def first_with(self, group):
        """The number of the first row with this Group: rows may differ in nothing but what the table chooses."""
        return min(number for (number, _), other in self.groups.items() if other is group)


def rank(item):
    """Sorts the groups of a table: by row, float32 first."""
    (number, precision), _ = item
    return number, precision != "fp32", precision


@dataclass(frozen=True)
class Standing:
    """All that a results file holds: the published table, tables like it, other runs, and seeds that disagree."""

    table: Table
    variants: list  # of Table
    others: list  # of Group
    disagreements: list  # lines

    @property
    def tables(self):
        """The tables with runs, the published one first."""
        return [table for table in (self.table, *self.variants) if table.groups]

    @property
    def groups(self):
        """Every Group once, by its name: those of rows under their numbers, with the table where there are several."""
        found = {}
        for table in self.tables:
            title = f" ({table.title})" if table.title and len(self.tables) > 1 else ""
            for (number, precision), group in sorted(table.groups.items(), key=rank):
                if table.first_with(group) == number:
                    found[f"row {number}{in_precision(precision)}{title}"] = group
        return found | {group.name: group for group in self.others}


def in_precision(precision):
    """What is added to the name of a configuration: nothing for fp32, from which the others are told apart."""
    return "" if precision == "fp32" else f", {precision}"


def configuration_of(record):
    """What runs of the same configuration share: the row, or the options; the precision; the weights file."""
    return record.row or record.configuration, record.settings["precision"], record.weights_sha256


def one_per_seed(records):
    """([the first Record of each seed of each configuration], [a line for each seed with different results]).

    A seed that was run again is no further sample of what training varies, on whatever device.
    """
    by_seed = {}
    for record in records:
        by_seed.setdefault((*configuration_of(record), record.seed), []).append(record)
    disagreements = []
    for same in by_seed.values():
        results = {}
        for record in same:
            results.setdefault((record.train, record.validation, record.test), record)
        if len(results) > 1:
            name = f"Row {same[0].row}" if same[0].row else same[0].configuration
            split = next(s for s in reversed(SPLITS) if len({getattr(record, s) for record in results.values()}) > 1)
            found = "; ".join(
                f"{SPLITS[split].lower()} {getattr(record, split)} on {record.device_name}, PyTorch {record.torch}"
                for record in results.values()
            )
            disagreements.append(
                f"{name}, seed {same[0].seed}: results differ by device or version, the first counts: {found}"
            )
    # Of equal results one that holds its mistakes is worth more: it may stand in a file beside an old one.
    first = [next((record for record in same if record.confusions), same[0]) for same in by_seed.values()]
    return first, disagreements


def arrange(records, rows, defaults):
    """The Standing of records; `rows` maps numbers to Rows, `defaults` are those of the settings, by name."""
    records, disagreements = one_per_seed(records)
    by_configuration, files = {}, {}
    for record in records:
        by_configuration.setdefault(configuration_of(record), []).append(record)
        files.setdefault(record.configuration, set()).add(record.weights_sha256)
    published, variants, others = Table(""), {}, []
    for (what, precision, weights_sha256), same in by_configuration.items():
        name = same[0].configuration + in_precision(precision)
        if what not in rows and len(files[same[0].configuration]) > 1:  # a file that was replaced by one of its name
            name += f", weights {weights_sha256[:8]}"
        group = Group(name, same)
        if what in rows:
            published.groups.setdefault((what, precision), group)
            continue
        numbers = rows_of(same[0], rows, defaults)
        for number in numbers:
            table = variants.setdefault(table_of(same[0]), Table(title_of(same[0], defaults)))
            earlier = table.groups.get((number, precision))  # the same weights under another path
            table.groups[number, precision] = group if earlier is None else earlier.joined(group)
        if not numbers:
            others.append(group)
    tables, titles = [], [table.title for table in variants.values()]
    for key, table in variants.items():
        distinct = {id(group): group for group in table.groups.values()}
        if len(distinct) == 1:  # one row is no table
            others += distinct.values()
            continue
        if titles.count(table.title) > 1:
            *_, data_sha256, weights_sha256 = key
            table.title += f", weights {weights_sha256[:8]}" if weights_sha256 else f", data {data_sha256[:8]}"
        tables.append(table)
    return Standing(published, tables, others, disagreements)


def rows_of(record, rows, defaults):
    """The numbers of the rows whose options a run has, whatever its TABLE_OPTIONS; baselines are none."""
    free = (*FREE_OPTIONS, *TABLE_OPTIONS)
    names = [name for name in defaults if name not in free]
    if any(name not in record.settings for name in defaults if name != "features"):
        return []
    return [
        number
        for number, row in rows.items()
        if all(record.settings[name] == row.options.get(name, defaults[name]) for name in names)
    ]


def table_of(record):
    """What the runs of one table share."""
    names = [name for name in TABLE_OPTIONS if name != "weights"]  # a file is known by its content
    return *(record.settings[name] for name in names), record.data_sha256, record.weights_sha256


def title_of(record, defaults):
    """A table's choice of TABLE_OPTIONS, in words."""
    changes = {name: record.settings[name] for name in TABLE_OPTIONS if record.settings[name] != defaults[name]}
    words = [describe_settings(changes)] if changes else []
    words += [f"own data {record.data_sha256[:8]}"] if record.data == "own" else []
    return ", ".join(words) or "the same settings"


def options_in(table, row):
    """A row's options, {name: value}, without those that the table chooses."""
    return {name: value for name, value in row.options.items() if not table.title or name not in TABLE_OPTIONS}


# --- comparisons ---


@dataclass(frozen=True)
class Answer:
    """What was measured of one Question in one table."""

    question: object
    table: Table
    comparison: object | None  # None: not compared
    remark: str  # why not, or what is to be known


def answer_questions(standing, questions):
    """[Answer, ...] for each table with runs, p-values corrected over all of them."""
    answers = []
    for table in standing.tables:
        for question in questions:
            answers.append(Answer(question, table, *compare_groups(*table.pair(question.a, question.b))))
    corrected = iter(holm([answer.comparison for answer in answers if answer.comparison]))
    return [
        Answer(answer.question, answer.table, next(corrected), answer.remark) if answer.comparison else answer
        for answer in answers
    ]


def compare_groups(a, b):
    """(the Comparison of two Groups or None, a remark)."""
    if a is None or b is None:
        return None, "not yet run"
    if a is b:
        return None, "the same configuration here"
    if not a.tested or not b.tested:
        return None, "run by an earlier version, which did not record the single mistakes"
    same_data = a.tested[0].data_sha256 == b.tested[0].data_sha256 != ""
    samples = paired_samples(a, b) if same_data else None
    if samples is None:
        return None, "on other messages"
    remarks = []
    for kind, values in (
        ("on", [record.device_name for record in (*a.tested, *b.tested)]),
        ("in", [record.settings["precision"] for record in (*a.tested, *b.tested)]),
    ):
        if len(different := list(dict.fromkeys(values))) > 1:
            remarks.append(f"{kind} {' and '.join(different)}")
    return compare(*samples), "; ".join(remarks)


def paired_samples(a, b):
    """The Samples of two Groups on the same data, or None where they were not tested on the same messages.

    Messages that all runs got right are alike, and only counted.
    """
    totals = {record.confusions["test"].totals for record in (*a.tested, *b.tested)}
    if len(totals) > 1 or sum(next(iter(totals))) == 0:
        return None
    n = sum(next(iter(totals)))
    columns = {number: i for i, number in enumerate(sorted(set().union(*a.called, *b.called)))}
    samples = []
    for group in (a, b):
        correct = np.ones((len(group.tested), n), dtype=bool)
        for run, called in zip(correct, group.called, strict=True):
            run[[columns[number] for number in called]] = False
        seeds = tuple(record.seed for record in group.tested)
        samples.append(Sample(seeds, correct, group.called, is_trained_by_chance=not group.is_baseline))
    return samples

"""Count what a classifier got right and wrong: accuracies with their intervals, and the single mistakes."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from scipy.special import ndtri, stdtrit

from runner.data.datasets import SPLITS
from runner.wording import printable

Z95 = float(ndtri(0.975))  # the normal distribution has 95% of its mass within this many standard deviations


class Accuracy(NamedTuple):
    """`correct` of `total` messages classified as labelled; prints as a percentage."""

    correct: float  # a whole number; the mean of several runs need not be
    total: int

    @property
    def fraction(self):
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self):
        """Return the 95% score interval (low, high) of the fraction (Wilson 1927).

        Unlike p ± 1.96 sqrt(p (1 - p) / n) it stays within 0 and 1, and has a width even if all or none are right.
        """
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.fraction
        center = p + Z95**2 / (2 * n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        low, high = (bound / (1 + Z95**2 / n) for bound in (center - half, center + half))
        return low if p > 0 else 0.0, high if p < 1 else 1.0  # rounding would miss 0 and 1

    def __str__(self):
        return f"{self.fraction * 100:.2f}%" if self.total else "n/a"

    @property
    def in_full(self):
        """Return `95.00% (285/300, 95% interval 91.9–96.9)`, or `n/a` without messages."""
        if not self.total:
            return str(self)
        low, high = (100 * end for end in self.interval)
        return f"{self} ({self.correct}/{self.total}, 95% interval {low:.1f}–{high:.1f})"


def mean_interval(mean, mean_variance, residual):
    """Return the 95% interval (low, high) of the mean Accuracy of several seeds on the same messages.

    It is made like that of a difference, see comparison.py: `mean_variance` (variance, degrees of freedom) is that of
    the mean by the choice of seeds, Wilson's interval is that by messages, and `residual`, which is in both, is
    subtracted once.
    """
    variance, freedom = mean_variance
    by_seeds = math.sqrt(max(stdtrit(freedom, 0.975) ** 2 * variance - Z95**2 * residual, 0.0))
    below, above = (math.hypot(by_seeds, mean.fraction - end) for end in mean.interval)
    return max(mean.fraction - below, 0.0), min(mean.fraction + above, 1.0)


class Mistake(NamedTuple):
    """A message that was not classified as labelled."""

    index: int  # of the message in its split
    label: int
    predicted: int  # the class
    confidence: float  # the probability of the predicted class; of a baseline, the margin


@dataclass(frozen=True)
class Confusion:
    """The labelled messages of each class in a split, counted, and the mistakes. Raises ValueError if they differ."""

    totals: list[int]  # of each of the K classes
    mistakes: list[Mistake]  # by index

    def __post_init__(self):
        classes = {*range(len(self.totals))}
        if any(not {mistake.label, mistake.predicted} <= classes for mistake in self.mistakes):
            raise ValueError("a mistake is of no class")
        if any(true_positives < 0 for true_positives, _, _ in self.counts):
            raise ValueError("there are more mistakes than messages")

    @classmethod
    def from_predictions(cls, indices, labels, predicted, confidences, n_classes):
        """Return the Confusion of n messages from lists (n,). Messages with a negative label do not count."""
        rows = [row for row in map(Mistake, indices, labels, predicted, confidences) if row.label >= 0]
        totals = Counter(row.label for row in rows)
        mistakes = sorted(row for row in rows if row.label != row.predicted)
        return cls([totals[label] for label in range(n_classes)], mistakes)

    @property
    def accuracy(self):
        return self.accuracy_excluding(())

    def accuracy_excluding(self, indices):
        """Return the Accuracy of the messages that are not at these indices, all of which must have a label."""
        wrong = len({mistake.index for mistake in self.mistakes}.difference(indices))
        total = sum(self.totals) - len(indices)
        return Accuracy(total - wrong, total)

    @property
    def most_frequent(self):
        """Return the Accuracy of predicting the most frequent class for every message."""
        return Accuracy(max(self.totals), sum(self.totals))

    @property
    def counts(self):
        """Return [(true positives, false positives, false negatives), ...] of the K classes."""
        missed, wrongly = Counter(m.label for m in self.mistakes), Counter(m.predicted for m in self.mistakes)
        return [(total - missed[k], wrongly[k], missed[k]) for k, total in enumerate(self.totals)]

    @property
    def precision_and_recall(self):
        """Return [(precision, recall), ...] of the K classes, as Accuracies of those predicted or labelled so."""
        return [(Accuracy(tp, tp + fp), Accuracy(tp, tp + fn)) for tp, fp, fn in self.counts]

    @property
    def macro_f1(self):
        """Return the mean over the classes of F1 = 2 TP / (2 TP + FP + FN); NaN of no messages.

        As in scikit-learn's f1_score(..., average="macro"), a class counts if a message has it as label or prediction.
        """
        scores = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in self.counts if tp + fp + fn]
        return statistics.fmean(scores) if scores else math.nan

    @property
    def needs_macro_f1(self):
        """Tell whether accuracy alone says little: there are three classes or more, or two of unequal size."""
        return len(self.totals) > 2 or max(self.totals) > 2 * min(self.totals)

    def describe(self, names):
        """Return the number of mistakes for each pair of classes, in words, for the ten most frequent pairs."""
        pairs = Counter((mistake.label, mistake.predicted) for mistake in self.mistakes)
        ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        words = [f"{n} of {self.totals[a]} {names[a]} predicted as {names[b]}" for (a, b), n in ordered[:10]]
        if more := ordered[10:]:
            words.append(f"and {sum(n for _, n in more)} in {len(more)} other pairs of classes")
        return ", ".join(words) or "none"

    def most_confident(self, n):
        """Return the n mistakes with the highest confidence."""
        return sorted(self.mistakes, key=lambda mistake: -mistake.confidence)[:n]


def spoken(record):
    """Return the names of the classes of a Record for sentences: a number is `class 3`."""
    return [f"class {name}" if name.removeprefix("-")[:1].isdigit() else name for name in record.class_names]


def describe_accuracies(record):
    """Return the lines that a run prints about the accuracies of its Record, and the numbers of its errors."""
    confusion, names, repeated = record.confusions["test"], spoken(record), record.duplicates["test"].similar
    lines = [f"{SPLITS[name]} accuracy: {found.accuracy.in_full}" for name, found in record.confusions.items()]
    if repeated:
        are = "is" if len(repeated) == 1 else "are"
        without = f"Test accuracy without the {len(repeated)} that {are} like training messages"
        lines.append(f"{without}: {record.unseen.in_full}")
    if confusion.most_frequent.fraction > min(0.6, record.test.interval[0]):
        lines.append(f"Test accuracy of always the most frequent class: {confusion.most_frequent}")
    if confusion.needs_macro_f1:
        lines.append(f"Test macro-averaged F1: {confusion.macro_f1:.3f}")
    lines.append(f"Test errors: {confusion.describe(names)}")
    if len(names) == 2:
        classes = zip(names, confusion.precision_and_recall, strict=True)
        words = ", ".join(f"{name} {precision} and {recall}" for name, (precision, recall) in classes)
        lines.append(f"Test precision and recall: {words}")
    return lines


def describe_mistakes(record):
    """Return lines with the three most confident test mistakes of a Record."""
    lines, names = [], spoken(record)
    for mistake, text in zip(record.confusions["test"].most_confident(3), record.texts):
        cut = printable(text)[:60] + "…" * (len(printable(text)) > 60)
        lines.append(f"  {mistake.confidence:.3f} {names[mistake.predicted]}, labelled {names[mistake.label]}: {cut}")
    heading = f"Most confident test mistakes{' (with their margins)' * record.is_baseline}:"
    return [heading, *lines] if lines else []

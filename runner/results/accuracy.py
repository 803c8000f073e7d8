"""What a classifier got right and wrong: accuracies with their intervals, and the single mistakes."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from runner.wording import shown

# --- accuracies ---

Z95 = float(ndtri(0.975))  # the normal distribution has 95% of its mass within this many standard deviations


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` messages classified as labelled; prints as a percentage."""

    correct: float  # a whole number; the mean of several runs need not be
    total: int

    @property
    def fraction(self):
        """correct / total; NaN where nothing was measured."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self):
        """The 95% score interval (low, high) of the fraction (Wilson 1927).

        Unlike p ± 1.96 sqrt(p (1 - p) / n) it stays within 0 and 1, and has a width also where all or none are right.
        """
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.fraction
        center = p + Z95**2 / (2 * n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        low, high = (bound / (1 + Z95**2 / n) for bound in (center - half, center + half))
        return low if p > 0 else 0.0, high if p < 1 else 1.0  # rounding would miss these

    def __str__(self):
        return f"{self.fraction * 100:.2f}%" if self.total else "n/a"

    @property
    def bounds(self):
        """The interval in percent: `91.9–96.9`."""
        low, high = self.interval
        return f"{low * 100:.1f}–{high * 100:.1f}"

    @property
    def in_full(self):
        """`95.00% (285/300, 95% interval 91.9–96.9)`."""
        return f"{self} ({self.correct}/{self.total}, 95% interval {self.bounds})"


def mean_interval(accuracies):
    """The 95% interval (low, high) of the mean of the Accuracies of S seeds on the same messages.

    Of one seed it is the interval of that Accuracy. Of several, the distance of each end from the mean is made of two,
    that of the interval of their mean Accuracy and that of the seeds by Student's t, squared and added (MOVER: Zou,
    Computational Statistics & Data Analysis 52, 2008). With two seeds it is very wide.
    """
    total, seeds = accuracies[0].total, len(accuracies)
    mean = Accuracy(statistics.fmean(accuracy.correct for accuracy in accuracies), total)
    low, high = mean.interval
    if seeds == 1 or not total:
        return low, high
    by_seeds = stdtrit(seeds - 1, 0.975) * statistics.stdev(one.fraction for one in accuracies) / math.sqrt(seeds)
    below, above = (math.hypot(by_seeds, mean.fraction - end) for end in (low, high))
    return max(mean.fraction - below, 0.0), min(mean.fraction + above, 1.0)


def mean_and_deviation(values):
    """Mean and sample standard deviation, which of a single value is NaN; both are, where a value is NaN."""
    if any(math.isnan(value) for value in values):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


# --- mistakes ---

MAX_COLUMNS = 10  # of a table of classes on a terminal


@dataclass(frozen=True)
class Mistake:
    """A message that was not classified as labelled."""

    number: int  # of the message in its split, from 0
    label: int
    called: int
    confidence: float  # the probability of the class it was called; of a classifier without, the margin


@dataclass(frozen=True)
class Confusion:
    """What became of the labelled messages of a split."""

    totals: tuple  # how many there are of each class
    mistakes: tuple  # of Mistake, by number

    @classmethod
    def of(cls, numbers, labels, called, confidences, n_classes):
        """The Confusion of n messages, described by lists (n,); a negative label is none and does not count."""
        labelled = sorted(row for row in zip(numbers, labels, called, confidences, strict=True) if row[1] >= 0)
        totals = Counter(label for _, label, _, _ in labelled)
        mistakes = (Mistake(*row) for row in labelled if row[1] != row[2])
        return cls(tuple(totals[label] for label in range(n_classes)), tuple(mistakes))

    @property
    def accuracy(self):
        """How many were classified as labelled: an Accuracy."""
        return Accuracy(sum(self.totals) - len(self.mistakes), sum(self.totals))

    @property
    def most_frequent(self):
        """The Accuracy of calling every message the most frequent class of the split."""
        return Accuracy(max(self.totals), sum(self.totals))

    @property
    def counts(self):
        """(K, K) int: how many of each class (row) were called each class (column)."""
        counts = np.diag(self.totals)
        for mistake in self.mistakes:
            counts[mistake.label, mistake.label] -= 1
            counts[mistake.label, mistake.called] += 1
        return counts

    @property
    def macro_f1(self):
        """The mean over the classes of F1 = 2 TP / (2 TP + FP + FN); NaN where nothing was measured.

        A class that no message is labelled with is left out; a message that was called so is an FN of its own class.
        """
        counts = self.counts
        labelled, called = counts.sum(axis=1), counts.sum(axis=0)
        scores = 2 * counts.diagonal()[labelled > 0] / (labelled + called)[labelled > 0]
        return float(scores.mean()) if len(scores) else math.nan

    def describe(self, class_names):
        """The errors of each class: for two a line in words, else a small table, for many classes without columns."""
        counts = self.counts
        if len(self.totals) == 2:
            words = [
                f"{counts[label][1 - label]} of {total} {class_names[label]} called {class_names[1 - label]}"
                for label, total in enumerate(self.totals)
            ]
            return ["errors: " + ", ".join(words)]
        sums = [f"{total - counts[label][label]} of {total}" for label, total in enumerate(self.totals)]
        if len(self.totals) > MAX_COLUMNS:
            return ["errors: " + ", ".join(f"{name}: {n}" for name, n in zip(class_names, sums, strict=True))]
        table = [["label", *(f"called {name}" for name in class_names), "errors"]]
        table += [[name, *row, n] for name, row, n in zip(class_names, counts, sums, strict=True)]
        widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
        lines = ["  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return ["errors:", *(f"  {line}" for line in lines)]

    def most_confident(self, n):
        """The n mistakes of which the classifier was most certain."""
        return sorted(self.mistakes, key=lambda mistake: -mistake.confidence)[:n]


def describe_mistakes(confusion, class_names, texts, measure=""):
    """Lines on the test messages: the errors of each class, and the three mistakes made with most confidence.

    `measure` says what the confidence is where it is no probability.
    """
    lines = confusion.describe(class_names)
    lines[0] = f"Test {lines[0]}"
    worst = confusion.most_confident(3)
    if worst:
        lines.append(f"Most confident test mistakes{measure}:")
    for mistake in worst:
        text = shown(texts[mistake.number])
        lines.append(
            f"  {mistake.confidence:.3f} {class_names[mistake.called]}, labelled {class_names[mistake.label]}: "
            f"{text[:60]}{'…' if len(text) > 60 else ''}"
        )
    return lines

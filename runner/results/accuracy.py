"""What a classifier got right and wrong: accuracies with their intervals, and the single mistakes."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
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
    def in_full(self):
        """`95.00% (285/300, 95% interval 91.9–96.9)`."""
        low, high = (100 * end for end in self.interval)
        return f"{self} ({self.correct}/{self.total}, 95% interval {low:.1f}–{high:.1f})"


def mean_accuracy(accuracies):
    """The mean of Accuracies on the same messages, an Accuracy; its own interval does not hold the seeds."""
    return Accuracy(statistics.fmean(accuracy.correct for accuracy in accuracies), accuracies[0].total)


def mean_interval(accuracies):
    """The 95% interval (low, high) of the mean of the Accuracies of S seeds on the same messages.

    Of one seed it is the interval of that Accuracy. Of several, the distance of each end from the mean is made of two,
    that of the interval of their mean Accuracy and that of the seeds by Student's t, squared and added (MOVER: Zou,
    Computational Statistics & Data Analysis 52, 2008). With two seeds it is very wide.
    """
    mean, seeds = mean_accuracy(accuracies), len(accuracies)
    if seeds == 1 or not mean.total:
        return mean.interval
    by_seeds = stdtrit(seeds - 1, 0.975) * statistics.stdev(one.fraction for one in accuracies) / math.sqrt(seeds)
    below, above = (math.hypot(by_seeds, mean.fraction - end) for end in mean.interval)
    return max(mean.fraction - below, 0.0), min(mean.fraction + above, 1.0)


# --- mistakes ---

MAX_COLUMNS = 10  # of a table of classes on a terminal


class Mistake(NamedTuple):
    """A message that was not classified as labelled."""

    number: int  # of the message in its split, from 0
    label: int
    called: int
    confidence: float  # the probability of the class it was called; of a classifier without, the margin


@dataclass(frozen=True)
class Confusion:
    """What became of the labelled messages of a split."""

    totals: list  # how many there are of each of the K classes
    mistakes: list  # of Mistake, by number

    @classmethod
    def of(cls, numbers, labels, called, confidences, n_classes):
        """The Confusion of n messages, described by lists (n,); a negative label is none and does not count."""
        rows = [row for row in map(Mistake, numbers, labels, called, confidences) if row.label >= 0]
        totals = Counter(row.label for row in rows)
        mistakes = sorted(row for row in rows if row.label != row.called)
        return cls([totals[label] for label in range(n_classes)], mistakes)

    @property
    def accuracy(self):
        """How many were classified as labelled: an Accuracy."""
        return self.without(())

    def without(self, numbers):
        """The Accuracy of the messages but for those with these numbers, all of which have a label."""
        wrong = sum(mistake.number not in numbers for mistake in self.mistakes)
        total = sum(self.totals) - len(numbers)
        return Accuracy(total - wrong, total)

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

    @property
    def needs_macro_f1(self):
        """Whether accuracy alone says little: more than two classes, or one more than twice as large as the other."""
        return len(self.totals) > 2 or max(self.totals) > 2 * min(self.totals)

    def describe(self, class_names):
        """The errors of each class: for two a line in words, else a small table, for many classes without columns."""
        counts = self.counts
        wrong = [f"{total - counts[label, label]} of {total}" for label, total in enumerate(self.totals)]
        if len(self.totals) == 2:
            pairs = zip(wrong, class_names, reversed(class_names), strict=True)
            return ["errors: " + ", ".join(f"{n} {name} called {other}" for n, name, other in pairs)]
        if len(self.totals) > MAX_COLUMNS:
            return ["errors: " + ", ".join(f"{name}: {n}" for name, n in zip(class_names, wrong, strict=True))]
        table = pd.DataFrame(counts, class_names, [f"called {name}" for name in class_names])
        lines = table.assign(errors=wrong).rename_axis(columns="label").to_string().splitlines()
        return ["errors:", *(f"  {line}" for line in lines)]

    def most_confident(self, n):
        """The n mistakes of which the classifier was most certain."""
        return sorted(self.mistakes, key=lambda mistake: -mistake.confidence)[:n]


def describe_test(confusion, data, measure=""):
    """Lines that stand beside the test accuracy on a Dataset.

    Accuracy without repeated messages, what lopsided classes make of it, the errors of each class, and the three
    mistakes made with most confidence; `measure` says what that is where it is no probability.
    """
    lines, names = [], data.class_names
    if repeated := data.repeats["test"].similar:
        accuracy = confusion.without(repeated).in_full
        lines.append(f"Test accuracy without the {len(repeated)} that are like training messages: {accuracy}")
    if confusion.most_frequent.fraction > 0.6:
        lines.append(f"Test accuracy of always the most frequent class: {confusion.most_frequent}")
    if confusion.needs_macro_f1:
        lines.append(f"Test macro-averaged F1: {confusion.macro_f1:.3f}")
    errors, *table = confusion.describe(names)
    lines += [f"Test {errors}", *table]
    if worst := confusion.most_confident(3):
        lines.append(f"Most confident test mistakes{measure}:")
    for mistake in worst:
        text = shown(data.test_texts[mistake.number])
        cut = text[:60] + "…" * (len(text) > 60)
        lines.append(f"  {mistake.confidence:.3f} {names[mistake.called]}, labelled {names[mistake.label]}: {cut}")
    return lines

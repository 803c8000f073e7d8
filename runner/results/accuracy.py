"""What a classifier got right and wrong: accuracies with their intervals, and the single mistakes."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from scipy.special import ndtri, stdtrit

from runner.wording import shown

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


def mean_interval(accuracies):
    """The 95% interval (low, high) of the mean of the Accuracies of S seeds on the same messages.

    Of one seed it is the interval of that Accuracy. Of several, the distance of each end from the mean is made of two,
    that of the interval of their mean Accuracy and that of the seeds by Student's t, squared and added (MOVER: Zou,
    Computational Statistics & Data Analysis 52, 2008). With two seeds it is very wide.
    """
    seeds = len(accuracies)
    mean = Accuracy(statistics.fmean(one.correct for one in accuracies), accuracies[0].total)
    if seeds == 1 or not mean.total:
        return mean.interval
    by_seeds = stdtrit(seeds - 1, 0.975) * statistics.stdev(one.fraction for one in accuracies) / math.sqrt(seeds)
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
    """How many labelled messages of a split there are of each class, and those that were classified wrongly."""

    totals: list  # how many there are of each of the K classes
    mistakes: list  # of Mistake, by index

    @classmethod
    def from_predictions(cls, indices, labels, predicted, confidences, n_classes):
        """Build the Confusion of n messages from lists (n,). Messages with a negative label do not count."""
        rows = [row for row in map(Mistake, indices, labels, predicted, confidences) if row.label >= 0]
        totals = Counter(row.label for row in rows)
        mistakes = sorted(row for row in rows if row.label != row.predicted)
        return cls([totals[label] for label in range(n_classes)], mistakes)

    @property
    def accuracy(self):
        return self.accuracy_excluding(())

    def accuracy_excluding(self, indices):
        """Return the Accuracy of the messages that are not at these indices, all of which must have a label."""
        wrong = sum(mistake.index not in indices for mistake in self.mistakes)
        total = sum(self.totals) - len(indices)
        return Accuracy(total - wrong, total)

    @property
    def most_frequent(self):
        """The Accuracy of calling every message the most frequent class."""
        return Accuracy(max(self.totals), sum(self.totals))

    @property
    def macro_f1(self):
        """The mean over the classes of F1 = 2 TP / (2 TP + FP + FN); NaN where nothing was measured.

        A class that no message is labelled with is left out; a message predicted as such counts as an FN of its own.
        """
        missed, wrongly = Counter(m.label for m in self.mistakes), Counter(m.predicted for m in self.mistakes)
        found = {label: 2 * (total - missed[label]) for label, total in enumerate(self.totals) if total}  # twice TP
        scores = [n / (n + wrongly[label] + missed[label]) for label, n in found.items()]
        return statistics.fmean(scores) if scores else math.nan

    @property
    def needs_macro_f1(self):
        """Whether accuracy alone says little: not where there are two classes of similar size."""
        return len(self.totals) > 2 or max(self.totals) > 2 * min(self.totals)

    def describe(self, names):
        """How many of which class were called what, by the names of the classes; of many, the ten most frequent."""
        pairs = Counter((mistake.label, mistake.predicted) for mistake in self.mistakes).most_common(10)
        words = [f"{n} of {self.totals[label]} {names[label]} called {names[c]}" for (label, c), n in sorted(pairs)]
        return ", ".join(words) or "none"

    def most_confident(self, n):
        """The n mistakes of which the classifier was most certain."""
        return sorted(self.mistakes, key=lambda mistake: -mistake.confidence)[:n]


def describe_test(confusion, data, measure=""):
    """Lines that stand beside the test accuracy on a Dataset; `measure` names confidences that are no probabilities."""
    lines, names = [], data.class_names
    if repeated := data.repeats["test"].similar:
        accuracy = confusion.accuracy_excluding(repeated).in_full
        lines.append(f"Test accuracy without the {len(repeated)} that are like training messages: {accuracy}")
    if confusion.most_frequent.fraction > 0.6:
        lines.append(f"Test accuracy of always the most frequent class: {confusion.most_frequent}")
    if confusion.needs_macro_f1:
        lines.append(f"Test macro-averaged F1: {confusion.macro_f1:.3f}")
    lines.append(f"Test errors: {confusion.describe(names)}")
    if worst := confusion.most_confident(3):
        lines.append(f"Most confident test mistakes{measure}:")
    for mistake in worst:
        text = shown(data.test_texts[mistake.index])
        cut = text[:60] + "…" * (len(text) > 60)
        lines.append(f"  {mistake.confidence:.3f} {names[mistake.predicted]}, labelled {names[mistake.label]}: {cut}")
    return lines

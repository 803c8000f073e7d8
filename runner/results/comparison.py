"""Compare two configurations on the messages that both were tested on; what that shows is in docs/conclusions.md.

One run each: the exact test of McNemar (Psychometrika 12, 1947) on the messages that only one of the two gets right.
Its verdict is about these two classifiers. Three seeds or more of each: seeds and messages both vary, and the verdict
is about the configurations. The interval of the difference then has three variances:

- Messages: the variance of the mean difference over the n messages, with the padding of Agresti and Min (Statistics in
  Medicine 24, 2005).
- Seeds: the variance v of a configuration's S accuracies (divisor S - 1) is shrunk towards the mean v̄ of its table, as
  in a moderated t-test (Smyth, Statistical Applications in Genetics and Molecular Biology 3, 2004) whose prior counts
  as one degree of freedom: (v̄ + (S - 1) v) / S, with S degrees of freedom. A larger prior is wrong too often where one
  configuration varies much more than the others. Both sides are added, with Welch's degrees of freedom (Biometrika 34,
  1947). Runs with the same seed are not paired: their accuracies hardly correlate.
- Both: the residual mean square of each side's two-way table of seeds and messages, divided by S n. It is in both
  variances above and is subtracted once.

The half-width at a level is sqrt(z² messages + max(t² seeds - z² both, 0)) (MOVER: Zou, Computational Statistics & Data
Analysis 52, 2008). p is the level at which the interval touches zero.
"""

import math
import statistics
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, ndtri, stdtrit  # scipy.stats and scipy.optimize take long to import

LEVEL = 0.05
MIN_SEEDS = 3  # with two, no method keeps its level: the differences may tie
MIN_CONFIGURATIONS = 5  # whose mean variance is worth shrinking towards
STEPS = 10**9  # p-values of several seeds are found in steps of 1 / STEPS
MAX_SEEDS = 100  # more are not advised


class MeanVariance(NamedTuple):
    """The variance of a mean accuracy by the choice of its seeds, and its degrees of freedom."""

    variance: float = 0.0
    freedom: float = 1.0


def seed_variances(accuracies):
    """Return the MeanVariance of each configuration of a table from its accuracies, a list of lists (S,).

    The variance of a single run is not known and counts as 0: its interval is that of the run itself.
    """
    known = [statistics.variance(seeds) for seeds in accuracies if len(seeds) > 1]
    prior = 1 if len(known) >= MIN_CONFIGURATIONS else 0  # degrees of freedom
    found = []
    for seeds in accuracies:
        if len(seeds) == 1:
            found.append(MeanVariance())
            continue
        freedom = prior + len(seeds) - 1
        shrunk = (prior * statistics.fmean(known) + (len(seeds) - 1) * statistics.variance(seeds)) / freedom
        found.append(MeanVariance(shrunk / len(seeds), freedom))
    return found


class Sample(NamedTuple):
    """The runs of one configuration on n messages."""

    name: str  # of the configuration in a sentence: "row 1"
    seeds: tuple  # of the S runs; (None,) for a classifier that has no seed
    predicted: np.ndarray  # (S, n) int: the predicted class, -1 where that is the label
    mean_variance: MeanVariance

    @property
    def correct(self):
        """Return (S, n) float: 1 where a message was classified as labelled, else 0."""
        return (self.predicted == -1).astype(float)

    @property
    def n_seeds(self):
        """Return S. A classifier without a seed does not vary, like the mean of infinitely many."""
        return math.inf if self.seeds == (None,) else len(self.seeds)

    @property
    def residual(self):
        """Return the residual mean square of the two-way table of seeds and messages, divided by S n."""
        n_seeds, n = self.predicted.shape
        squares = (self.correct - self.correct.mean(1, keepdims=True) - self.correct.mean(0) + self.correct.mean()) ** 2
        return float(squares.sum()) / (max(n_seeds - 1, 1) * max(n - 1, 1)) / squares.size


class Variances(NamedTuple):
    """The variances of a mean difference by messages and by seeds, and the part that is in both; see above."""

    messages: float
    seeds: float = 0.0
    both: float = 0.0
    freedom: float = 1.0  # of `seeds`

    def half_width(self, level):
        """Return half the width of the interval that holds the true difference with probability 1 - level.

        The seeds never make it narrower than the messages alone.
        """
        z, t = ndtri(level / 2), stdtrit(self.freedom, level / 2)
        return math.sqrt(z**2 * self.messages + max(t**2 * self.seeds - z**2 * self.both, 0.0))

    def with_seeds(self, factor):
        """Return the Variances that `factor` times as many seeds would have."""
        messages = max(self.messages - self.both, 0.0) + self.both / factor
        return Variances(messages, self.seeds / factor, self.both / factor, self.freedom * factor)


@dataclass
class Comparison:
    """How much better b is than a, in fractions of the messages."""

    difference: float
    interval: tuple  # 95%, (low, high), of this question alone
    p: float | None  # after correction for the number of questions; None where there is no verdict
    basis: str  # what was compared
    n_seeds: int  # the smaller number of both sides
    variances: Variances
    is_same: bool  # whether both have the same seeds and the same predictions

    @property
    def verdict(self):
        """Return the verdict on b in words."""
        low, high = self.interval
        if self.is_same:
            return "the same predictions"
        if self.p is None:
            return "no verdict"
        word = "better" if self.difference > 0 else "worse"
        if self.p < LEVEL:
            return word
        return f"probably {word}" if low > 0 or high < 0 else "undecided"

    @property
    def sentence(self):
        """Return what was found, in a sentence that begins with the verdict."""
        verdict, (low, high) = self.verdict, (100 * end for end in self.interval)
        if self.is_same:
            return f"{verdict} ({'one run each' if self.n_seeds == 1 else self.basis})."
        points, word = f"{100 * abs(self.difference):.2f} points", "better" if self.difference > 0 else "worse"
        measured = "no difference" if points == "0.00 points" else f"{points} {word}"
        smaller, larger = sorted((abs(low), abs(high)))
        interval = f"{smaller:.1f} to {larger:.1f}"
        if low <= 0 <= high:
            interval = f"{abs(low):.1f} worse to {high:.1f} better"
        if self.p is None:  # the seeds are not in the interval
            return f"no verdict: {measured} (95% interval of these runs alone {interval}); {self.basis}."
        if verdict == "undecided":
            words = f"undecided: between {abs(low):.1f} points worse and {high:.1f} better (95% interval)"
            words += f", measured {measured}"
        elif verdict == word:
            words = f"{measured} (95% interval {interval})"
        else:
            words = f"{verdict}, by {points} (95% interval {interval})"
        return f"{words}, {describe_p(self.p)}; {self.basis}."


def describe_p(p):
    """Return `p = 0.012`. A p near 1 is not printed, because many take it for a proof of equality."""
    return "p < 0.001" if p < 0.001 else "p > 0.5" if p > 0.5 else f"p = {p:.2g}"


def compare(a, b):
    """Return the Comparison of two Samples on the same messages, its p not yet corrected.

    For one run each the interval is that of Agresti and Min, the test is McNemar's; where they disagree, the test
    decides.
    """
    fewest, by_message = min(a.n_seeds, b.n_seeds), b.correct.mean(axis=0) - a.correct.mean(axis=0)
    center, messages = center_and_variance(by_message)
    variances = Variances(messages) if fewest < MIN_SEEDS else add_seeds(messages, a, b)
    half = variances.half_width(LEVEL)
    counts = [f"{one.n_seeds} seed{'s' * (one.n_seeds > 1)}" for one in (a, b) if one.seeds != (None,)]
    basis = f"{counts[0]} each" if counts[0] == counts[-1] and len(counts) == 2 else " and ".join(counts)
    if len(a.seeds) == len(b.seeds) == 1:
        only_a, only_b = int((by_message < 0).sum()), int((by_message > 0).sum())
        p = min(2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)), 1.0)  # a binomial test of 1/2, both sides
        basis = f"these two runs alone: {only_a} messages right only in {a.name}, {only_b} only in {b.name}"
    elif fewest < MIN_SEEDS:
        p = None
        basis += "; a verdict takes three seeds or more on both sides, or one run each"
    else:  # the larger the level, the narrower the interval
        step = bisect_left(range(STEPS), -abs(center), lo=1, key=lambda step: -variances.half_width(step / STEPS))
        p = step / STEPS
    interval = max(center - half, -1.0), min(center + half, 1.0)
    is_same = sorted(zip(a.seeds, a.predicted.tolist())) == sorted(zip(b.seeds, b.predicted.tolist()))
    return Comparison(float(by_message.mean()), interval, p, basis, fewest, variances, is_same)


def center_and_variance(by_message):
    """Return the center of the interval of a mean difference, and its variance by messages, from differences (n,).

    Agresti and Min add half a message to each cell of the table of pairs, which is two messages whose differences have
    the sum 0 and the sum of squares 1. So the variance is not zero where few messages differ.
    """
    padded = np.append(by_message, [math.sqrt(0.5), -math.sqrt(0.5)])
    return float(padded.mean()), float(padded.var()) / len(padded)


def add_seeds(messages, a, b):
    """Return the Variances of the difference of two Samples, whose variance by messages is `messages`."""
    seeds = a.mean_variance.variance + b.mean_variance.variance
    squares = sum(variance**2 / freedom for variance, freedom in (a.mean_variance, b.mean_variance))
    return Variances(messages, seeds, a.residual + b.residual, seeds**2 / squares if seeds else 1.0)


def holm(p_values):
    """Return p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    p_values = np.array(p_values)
    order, corrected = p_values.argsort(), np.empty_like(p_values)
    weighted = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(weighted).clip(max=1.0)
    return corrected.tolist()


def describe_power(comparisons, level):
    """Return a line on the difference that the runs can show, and the number of seeds that would show 3 points; or "".

    The difference is the median half-width of the intervals at `level`: of several seeds if there are any, else of
    single runs.
    """
    tested = [found for found in comparisons if found.p is not None and not found.is_same]
    if not tested:
        return ""
    by_seeds = [found for found in tested if found.n_seeds >= MIN_SEEDS]
    shown = 100 * statistics.median(found.variances.half_width(level) for found in by_seeds or tested)
    words = f"These {'seeds' if by_seeds else 'single runs'} can show a difference of about {shown:.1f} points or more"
    if not by_seeds:
        return f"{words}; a conclusion about an option, rather than two runs, takes three seeds or more on both sides."
    for seeds in range(MIN_SEEDS, MAX_SEEDS + 1):
        more = [found.variances.with_seeds(seeds / found.n_seeds) for found in by_seeds]
        if 100 * statistics.median(variances.half_width(level) for variances in more) <= 3:
            return f"{words}; to show 3 points takes about {seeds} seeds for each row."
    return f"{words}; to show 3 points takes more test messages, not only more seeds."

"""Two configurations compared on the messages that both were tested on.

One run each: the exact test of McNemar (Psychometrika 12, 1947) on the messages that only one of the two classifies as
labelled; its verdict is about these two classifiers. Three seeds or more of each: seeds and messages both vary, and the
verdict is about the configurations. Intervals are those of Agresti and Min (Statistics in Medicine 24, 2005), to which
the variation of seeds is added by MOVER (Zou, Computational Statistics & Data Analysis 52, 2008).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, ndtri, stdtrit  # scipy.stats and scipy.optimize take long to import

LEVEL = 0.05
MIN_SEEDS = 3  # with two, no method holds its level: their differences may tie
STEPS = 10**9  # p-values of several seeds are found in steps of 1 / STEPS


class Sample(NamedTuple):
    """The runs of one configuration on n messages."""

    seeds: tuple  # of the S runs
    predicted: np.ndarray  # (S, n) int: the predicted class, -1 where that is the label

    @property
    def correct(self):
        """(S, n) float: 1 where a message was classified as labelled, else 0."""
        return (self.predicted == -1).astype(float)


@dataclass
class Comparison:
    """How much better b is than a, in fractions of the messages."""

    difference: float
    interval: tuple  # 95%, (low, high), of this comparison alone; of these very runs where there is no verdict
    p: float | None  # of this comparison alone, until it is corrected by `holm`; None where no verdict may be drawn
    basis: str  # what was compared, and why no verdict may be drawn
    is_identical: bool  # whether both have the same seeds, and have the same predictions

    @property
    def verdict(self):
        """The verdict on b in words."""
        if self.is_identical:
            return "identical predictions"
        if self.p is None:
            return "no verdict"
        if self.p >= LEVEL:
            return "no difference shown"
        return "better" if self.difference > 0 else "worse"

    @property
    def sentence(self):
        """What was measured, in a sentence."""
        words, (low, high) = self.verdict, (100 * end for end in self.interval)
        if not self.is_identical:
            words += f", {100 * self.difference + 0.0:+.2f} points (95% interval {low:+.1f} to {high:+.1f})"
            if self.p is not None:
                words += ", p < 0.001" if self.p < 0.001 else f", p = {self.p:.2g}"
        return f"{words}; {self.basis}."


def compare(a, b):
    """The Comparison of two Samples on the same messages.

    The interval of the difference of one run each is that of Agresti and Min, the test is McNemar's; where they
    disagree, the test decides. Of several seeds the p-value is the level at which the interval touches zero.
    """
    fewest, by_message = min(len(a.seeds), len(b.seeds)), b.correct.mean(axis=0) - a.correct.mean(axis=0)
    basis = f"{len(a.seeds)} seeds each" if len(a.seeds) == len(b.seeds) else f"{len(a.seeds)} and {len(b.seeds)} seeds"
    centre, messages = centre_and_variance(by_message)
    variances = messages, *(seed_variance(a, b) if fewest >= MIN_SEEDS else (0.0, 0.0, 1.0))
    half = half_width(LEVEL, *variances)
    if len(a.seeds) == len(b.seeds) == 1:
        only_a, only_b = int((by_message < 0).sum()), int((by_message > 0).sum())
        p = min(2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)), 1.0)  # a binomial test of 1/2, both sides
        basis = f"one run each, {only_a} messages right only in the first, {only_b} only in the second"
    elif fewest < MIN_SEEDS:
        p = None
        basis += "; a verdict takes three seeds or more on both sides, or one run each"
    else:  # the larger the level, the narrower the interval
        p = bisect_left(range(STEPS), -abs(centre), lo=1, key=lambda p: -half_width(p / STEPS, *variances)) / STEPS
    interval = max(centre - half, -1.0), min(centre + half, 1.0)
    is_identical = sorted(zip(a.seeds, a.predicted.tolist())) == sorted(zip(b.seeds, b.predicted.tolist()))
    return Comparison(float(by_message.mean()), interval, p, basis, is_identical)


def centre_and_variance(by_message):
    """The centre of the interval of a mean difference, and its variance by the choice of messages; differences (n,).

    Agresti and Min add half a message to each cell of the table of pairs, which is two messages whose differences have
    the sum 0 and the sum of squares 1. So the variance is not zero where few messages differ.
    """
    padded = np.append(by_message, [math.sqrt(0.5), -math.sqrt(0.5)])
    return float(padded.mean()), float(padded.var()) / len(padded)


def seed_variance(a, b):
    """The variance of the mean difference by the choice of seeds: (variance, part of it, degrees of freedom).

    Where both ran the same seeds it is that of the differences of each seed, else the sum of both sides' own, with the
    degrees of freedom of Welch (Biometrika 34, 1947). The part is in the variance by messages too: what single seeds
    make of single messages, the residual of a two-way analysis of variance.
    """
    sides = [a.correct, b.correct]  # (S, n) each
    if set(a.seeds) == set(b.seeds):
        sides = [sides[1][[b.seeds.index(seed) for seed in a.seeds]] - sides[0]]
    variances, both = [], 0.0
    for side in sides:
        n_seeds, n = side.shape
        variances.append(float(side.mean(axis=1).var(ddof=1)) / n_seeds)
        residuals = side - side.mean(axis=1, keepdims=True) - side.mean(axis=0) + side.mean()
        both += float((residuals**2).sum()) / ((n_seeds - 1) * max(n - 1, 1)) / side.size
    total = sum(variances)
    freedom = total**2 / sum(v**2 / (len(side) - 1) for v, side in zip(variances, sides, strict=True)) if total else 1.0
    return total, both, freedom


def half_width(level, messages, seeds, both, freedom):
    """Half the width of the interval of a mean difference that holds the true one with probability 1 - level (MOVER).

    The parts of messages and seeds are squared, each with its own quantile, and added, less what is in both. Seeds
    never make it narrower than the messages alone.
    """
    z, t = ndtri(level / 2), stdtrit(freedom, level / 2)
    return math.sqrt(z**2 * messages + max(t**2 * seeds - z**2 * both, 0.0))


def holm(p_values):
    """A list of p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    p_values = np.array(p_values)
    order, corrected = p_values.argsort(), np.empty_like(p_values)
    weighted = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(weighted).clip(max=1.0)
    return corrected.tolist()

"""Two configurations compared on the messages that both were tested on.

One run each: the exact test of McNemar (Psychometrika 12, 1947) on the messages that only one of the two classifies as
labelled; its verdict is about these two classifiers. Three seeds or more of each: seeds and messages both vary, and the
verdict is about the configurations. Intervals are those of Agresti and Min (Statistics in Medicine 24, 2005), to which
the variation of seeds is added by MOVER (Zou, Computational Statistics & Data Analysis 52, 2008).
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit
from scipy.stats import binomtest

LEVEL = 0.05
MIN_SEEDS = 3  # with two, no method holds its level: their differences may tie
SMALLEST_P = 1e-9  # smaller ones are given as this

P_DECIDES = (
    "The p-value decides. It is corrected for the number of comparisons, and between single runs it is exact; "
    "an interval belongs to one comparison alone and may exclude zero where nothing is shown."
)


@dataclass(frozen=True)
class Sample:
    """The runs of one configuration on n messages."""

    seeds: tuple  # of the S runs
    correct: np.ndarray  # (S, n) bool: whether the message was classified as labelled
    called: tuple = ()  # (S): what each run called the messages, in any form that can be compared; else `correct` is

    @property
    def by_seed(self):
        """{seed: what the run called the messages}."""
        return dict(zip(self.seeds, self.called or [run.tobytes() for run in self.correct], strict=True))


@dataclass(frozen=True)
class Comparison:
    """How much better b is than a, in fractions of the n messages."""

    n: int
    seeds: tuple  # how many of a, and of b
    difference: float
    interval: tuple  # 95%, (low, high), of this comparison alone; of these very runs where there is no verdict
    p: float | None  # of this comparison alone; None where no verdict may be drawn
    reason: str | None  # why no verdict may be drawn
    only: tuple | None  # of one run each: how many messages only a, and only b, classified as labelled
    is_identical: bool  # whether both ran the same seeds, and each called all messages the same
    p_corrected: float | None = None  # for the number of comparisons, by `holm`

    @property
    def kind(self):
        """The verdict on b: "better", "worse", "open", "identical", or "unfit" where none may be drawn."""
        if self.is_identical:
            return "identical"
        if self.p is None:
            return "unfit"
        if (self.p if self.p_corrected is None else self.p_corrected) >= LEVEL:
            return "open"
        return "better" if self.difference > 0 else "worse"


def compare(a, b):
    """The Comparison of two Samples on the same messages.

    The interval of the difference of one run each is that of Agresti and Min, the test is McNemar's; where they
    disagree, the test decides. Of several seeds the p-value is the level at which the interval touches zero.
    """
    seeds, n = (len(a.seeds), len(b.seeds)), a.correct.shape[1]
    by_message = b.correct.mean(axis=0) - a.correct.mean(axis=0)
    of_seeds = seed_variance(a, b) if min(seeds) >= MIN_SEEDS else (0.0, 0.0, 1.0)
    variances = message_variance(by_message), *of_seeds
    centre, half = float(by_message.sum()) / (n + 2), half_width(LEVEL, *variances)

    p = reason = only = None
    if seeds == (1, 1):
        only = int((by_message < 0).sum()), int((by_message > 0).sum())
        p = float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0
    elif 1 in seeds:
        reason = "one run cannot be compared with several: each side needs three seeds or more"
    elif min(seeds) < MIN_SEEDS:
        reason = "two seeds are too few to tell a better option from chance: each side needs three or more"
    else:
        distance = min(abs(centre), half_width(SMALLEST_P, *variances))
        p = brentq(lambda level: half_width(level, *variances) - distance, SMALLEST_P, 1.0)
    return Comparison(
        n=n,
        seeds=seeds,
        difference=float(by_message.mean()),
        interval=(max(centre - half, -1.0), min(centre + half, 1.0)),
        p=p,
        reason=reason,
        only=only,
        is_identical=a.by_seed == b.by_seed,
    )


def message_variance(by_message):
    """The variance of the mean of differences (n,) by the choice of messages, with the adjustment of Agresti and Min.

    They add half a message to each cell of the table of pairs, which is two messages whose differences have the sum 0
    and the sum of squares 1. So the variance is not zero where few messages differ.
    """
    n = len(by_message) + 2
    return float((by_message**2).sum() + 1 - by_message.sum() ** 2 / n) / n**2


def seed_variance(a, b):
    """(variance of the mean difference by the choice of seeds, how much of it is in `message_variance` too, the degrees
    of freedom).

    Where both ran the same seeds it is that of the differences of each seed, else the sum of both sides' own, with the
    degrees of freedom of Welch (Biometrika 34, 1947). Both variances contain what single seeds make of single messages,
    the residual of a two-way analysis of variance.
    """
    sides = [a.correct.astype(float), b.correct.astype(float)]  # (S, n) each
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


def holm(comparisons):
    """The comparisons with p-values corrected for the number of those that have one, so that all hold together.

    Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected, highest = list(comparisons), 0.0
    order = sorted((i for i, one in enumerate(corrected) if one.p is not None), key=lambda i: corrected[i].p)
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * corrected[i].p))
        corrected[i] = replace(corrected[i], p_corrected=highest)
    return corrected

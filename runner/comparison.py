"""Two configurations compared on the messages that both were tested on.

All take the same test, so what counts are the messages that only one of the two classifies as labelled. Of one run each
these are counted: the exact McNemar test (McNemar 1947), and the score interval of Tango (Statistics in Medicine 17,
1998, 891-908) for the paired difference. Of several seeds the means are compared, and the interval holds the choice of
messages and the variation of training.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from .accuracy import Z95

LEVEL = 0.05
RESAMPLES = 10_000
SEED = 20_101_123  # of the resampling; no number of an experiment depends on it
MAX_RESAMPLED = 5_000  # messages; the mean over more of them is normal, and a table of resamples would be too large


@dataclass(frozen=True)
class Sample:
    """The runs of one configuration on n messages: which of them each run classified as labelled."""

    seeds: tuple  # of the S runs
    correct: np.ndarray  # (S, n) bool


@dataclass(frozen=True)
class Comparison:
    """How much better b is than a: fractions of the n messages, not points."""

    n: int
    runs: tuple  # how many of a, and of b
    difference: float
    interval: tuple  # 95%, (low, high)
    p: float
    only: tuple | None  # of one run each: how many messages only a, and only b, got right
    is_identical: bool  # whether all pairs of runs got the same messages right
    deviations: np.ndarray | None = field(default=None, compare=False, repr=False)  # of several seeds, see `resampled`
    p_corrected: float | None = None  # for the number of comparisons, by `holm`

    @property
    def smallest(self):
        """The smallest difference that these runs on these messages could have shown, among so many comparisons."""
        level = LEVEL if self.p_corrected is None else LEVEL * self.p / self.p_corrected
        if self.only is not None:
            return smallest_difference(sum(self.only), self.n, level)
        low, high = np.quantile(self.deviations, [level / 2, 1 - level / 2])
        return float(high - low) / 2

    @property
    def verdict(self):
        """better, worse, or what else can be said of b, in words."""
        if self.is_identical:
            return "identical predictions"
        if (self.p if self.p_corrected is None else self.p_corrected) < LEVEL:
            return "better" if self.difference > 0 else "worse"
        return f"no difference that these messages can show (it would have to be {100 * self.smallest:.1f} points)"


def compare(a, b):
    """The Comparison of two Samples on the same messages."""
    n = a.correct.shape[1]
    if len(a.seeds) == len(b.seeds) == 1:
        only_a = int((a.correct[0] & ~b.correct[0]).sum())
        only_b = int((b.correct[0] & ~a.correct[0]).sum())
        measured = dict(
            difference=(only_b - only_a) / n,
            interval=tango_interval(only_b, only_a, n),
            p=mcnemar(only_a, only_b),
            only=(only_a, only_b),
        )
    else:
        deviations = resampled(a, b)
        difference = float(b.correct.mean() - a.correct.mean())
        low, high = np.quantile(deviations, [LEVEL / 2, 1 - LEVEL / 2])
        below = (deviations >= difference).sum() if difference > 0 else (deviations <= difference).sum()
        measured = dict(
            difference=difference,
            interval=(max(difference - high, -1.0), min(difference - low, 1.0)),
            p=min(1.0, 2 * (int(below) + 1) / (RESAMPLES + 1)),
            only=None,
            deviations=deviations,
        )
    same = sorted(a.seeds) == sorted(b.seeds) and all(
        np.array_equal(a.correct[a.seeds.index(seed)], b.correct[b.seeds.index(seed)]) for seed in a.seeds
    )
    return Comparison(n=n, runs=(len(a.seeds), len(b.seeds)), is_identical=same, **measured)


# --- one run each ---


def mcnemar(only_a, only_b):
    """The p-value of the exact two-sided McNemar test: only one of the two got so many messages right.

    If neither is better, each of these messages falls to either of them like a coin.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    log_terms = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term - n * math.log(2)) for term in log_terms))


def tango_interval(more, less, n):
    """The 95% score interval (low, high) for the paired difference (more - less) / n (Tango 1998).

    Of n messages, `more` count for the difference and `less` against it. Its ends are where the score statistic equals
    the quantile of the normal distribution; they are found by bisection.
    """
    observed = (more - less) / n

    def score(delta):
        a = 2 * n
        b = -more - less + (2 * n - more + less) * delta
        c = -less * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # of `less`, the likeliest with this difference
        variance = n * (2 * q + delta * (1 - delta))
        distance = more - less - n * delta
        return (
            0.0 if distance == 0 else math.copysign(math.inf, distance) if variance <= 0 else distance / variance**0.5
        )

    def solve(inside, outside, sign):
        for _ in range(60):
            middle = (inside + outside) / 2
            if sign * score(middle) < Z95:
                inside = middle
            else:
                outside = middle
        return inside

    return solve(observed, -1.0, 1), solve(observed, 1.0, -1)


def smallest_difference(n_discordant, n, level=LEVEL):
    """The smallest difference that McNemar's test would have found with so many messages that only one got right.

    With few of them it finds none, at the level of 5% with fewer than six; then with as many more as that takes.
    """
    while mcnemar(0, n_discordant) >= level:
        n_discordant += 1
    fewer = 0
    while mcnemar(fewer + 1, n_discordant - fewer - 1) < level:
        fewer += 1
    return (n_discordant - 2 * fewer) / n


# --- several seeds ---


@cache
def resampling_weights(n):
    """(RESAMPLES, n) how often each of n messages is drawn, of n draws with replacement, less the one of the sample."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float32) - 1


def resampled(a, b):
    """(RESAMPLES,) deviations of the mean difference between b and a: by the choice of messages, and by training.

    The messages are drawn anew with replacement. Two to five seeds drawn anew would vary too little (of two, half the
    draws are twice the same); their mean instead deviates as Student's t with the seeds' own standard error: of the
    differences where both ran the same seeds, else of each side. That error holds what is peculiar to single seeds on
    single messages; it is taken out of the variation between messages, which holds it too (two-way analysis of
    variance without replication).
    """
    generator = np.random.default_rng(SEED + 1)
    if sorted(a.seeds) == sorted(b.seeds):
        sides = [b.correct[np.argsort(b.seeds)].astype(float) - a.correct[np.argsort(a.seeds)]]
    else:
        sides = [a.correct.astype(float), b.correct.astype(float)]
    by_message = b.correct.mean(axis=0) - a.correct.mean(axis=0)
    n, variance = len(by_message), by_message.var()
    if n <= MAX_RESAMPLED:
        deviations = (resampling_weights(n) @ by_message.astype(np.float32) / n).astype(float)
    else:
        deviations = generator.standard_normal(RESAMPLES) * (variance / n) ** 0.5
    several = [side for side in sides if len(side) > 1]
    peculiar = sum(residual_variance(side) / len(side) for side in several)
    if several and variance > 0:
        deviations *= max(1 - peculiar / variance, 0.5) ** 0.5  # an estimate: by chance it may be all of it
    squared = [(side.mean(axis=1).var(ddof=1) / len(side), len(side) - 1) for side in several]
    if total := sum(error for error, _ in squared):
        freedom = total**2 / sum(error**2 / degrees for error, degrees in squared)  # of two sides, Welch's
        deviations += total**0.5 * generator.standard_t(freedom, RESAMPLES)
    return deviations


def residual_variance(runs):
    """What varies in runs (S, n) beyond better and worse seeds and easier and harder messages."""
    n_seeds, n = runs.shape
    residual = runs - runs.mean(axis=1, keepdims=True) - runs.mean(axis=0, keepdims=True) + runs.mean()
    return float((residual**2).sum() / ((n_seeds - 1) * max(n - 1, 1)))


# --- many comparisons ---


def holm(comparisons):
    """The comparisons with p-values that are corrected for their number (Holm 1979), so that all hold together."""
    order = sorted(range(len(comparisons)), key=lambda i: comparisons[i].p)
    corrected, highest = list(comparisons), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * comparisons[i].p))
        corrected[i] = replace(comparisons[i], p_corrected=highest)
    return corrected

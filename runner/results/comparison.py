"""Two configurations compared on the messages that both were tested on.

All take the same test, so what counts are the messages that only one of the two classifies as labelled. Of one run each
these are counted: the exact McNemar test (McNemar 1947), and the score interval of Tango (Statistics in Medicine 17,
1998, 891-908) for the paired difference. Of several seeds the means are compared, and the interval holds the choice of
messages and the variation of training.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from runner.results.accuracy import Z95

LEVEL = 0.05
RESAMPLES = 10_000
SEED = 20_101_123  # of the resampling; no number of an experiment depends on it
MAX_RESAMPLED = 1_000  # messages; the mean over more of them is normal, and a table of resamples would be too large


@dataclass(frozen=True)
class Sample:
    """The runs of one configuration on n messages: which of them each run classified as labelled."""

    seeds: tuple  # of the S runs
    correct: np.ndarray  # (S, n) bool
    mistakes: tuple = ()  # of each run, what identical predictions have in common
    is_trained_by_chance: bool = True  # whether another seed could have given something else


@dataclass(frozen=True)
class Comparison:
    """How much better b is than a: fractions of the n messages, not points."""

    n: int
    runs: tuple  # how many of a, and of b
    difference: float
    interval: tuple  # 95%, (low, high), of this comparison alone
    p: float  # of this comparison alone
    only: tuple | None  # of one run each: how many messages only a, and only b, got right
    is_identical: bool  # whether the runs of each seed called all messages the same
    deviations: object = field(default=None, compare=False, repr=False)  # of several seeds: Deviations
    p_corrected: float | None = None  # for the number of comparisons, by `holm`
    among: int = 1  # how many comparisons there are

    @cached_property
    def smallest(self):
        """The smallest difference that these runs on these messages could have shown, among so many comparisons."""
        level = LEVEL / self.among
        if self.only is not None:
            return smallest_difference(sum(self.only), self.n, level)
        return self.deviations.exceeded_with(level)

    @property
    def kind(self):
        """The verdict on b in one word: better, worse, identical, or open."""
        if self.is_identical:
            return "identical"
        if (self.p if self.p_corrected is None else self.p_corrected) < LEVEL:
            return "better" if self.difference > 0 else "worse"
        return "open"

    @property
    def verdict(self):
        """The verdict in words."""
        if self.kind != "open":
            return {"identical": "identical predictions"}.get(self.kind, self.kind)
        what = "messages" if self.only is not None else "messages and seeds"
        return f"no difference that these {what} can show{self.limit}"

    @property
    def limit(self):
        """What would have been shown, in brackets."""
        among = f", among {self.among} comparisons" if self.p < LEVEL else ""
        if self.smallest >= 1:
            return f" (they can show none{among})"
        return f" (it would have to be {100 * self.smallest:.1f} points{among})"


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
        difference = float(b.correct.mean() - a.correct.mean())
        sides = sides_of(a, b)
        deviations = Deviations(message_deviations(a, b, sides), *training_error(a, b, sides))
        low, high = deviations.interval
        measured = dict(
            difference=difference,
            interval=(max(difference - high, -1.0), min(difference - low, 1.0)),
            p=deviations.exceeding(difference),
            only=None,
            deviations=deviations,
        )
    return Comparison(n=n, runs=(len(a.seeds), len(b.seeds)), is_identical=are_identical(a, b), **measured)


def are_identical(a, b):
    """Whether both ran the same seeds, and each called all messages the same."""
    if sorted(a.seeds) != sorted(b.seeds):
        return False
    return all(
        np.array_equal(a.correct[i], b.correct[b.seeds.index(seed)])
        and (not a.mistakes or a.mistakes[i] == b.mistakes[b.seeds.index(seed)])
        for i, seed in enumerate(a.seeds)
    )


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


@lru_cache(1)  # a report has one test set, as a rule
def resampling_weights(n):
    """(RESAMPLES, n) how often each of n messages is drawn, of n draws with replacement, less the one of the sample."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float32) - 1


@lru_cache(16)
def student(freedom):
    """(RESAMPLES,) draws from Student's t, in order."""
    return np.sort(np.random.default_rng(SEED + 1).standard_t(freedom, RESAMPLES))


@dataclass(frozen=True)
class Deviations:
    """How far a mean difference may be from the true one: by the choice of messages, and by training."""

    by_messages: np.ndarray  # (RESAMPLES,)
    error: float  # by training: a standard error
    freedom: float  # its degrees of freedom

    @property
    def interval(self):
        """The ends between which 95% of the deviations lie."""
        drawn = np.random.default_rng(SEED + 2).permutation(student(self.freedom)) if self.error else 0.0
        return tuple(np.quantile(self.by_messages + self.error * drawn, [LEVEL / 2, 1 - LEVEL / 2]).tolist())

    def exceeding(self, difference):
        """The probability of so large a deviation, to either side.

        It is the mean over the draws of Student's t of what remains for the messages, whose mean is normal: counting
        resamples would tell nothing below one in 10,000.
        """
        spread, by_training = float(self.by_messages.std()), 0.0
        if self.error:
            by_training = self.error * student(self.freedom)[10::20]  # in order: each stands for twenty
        distances = abs(difference) + np.array([by_training, -by_training]).ravel()
        if spread == 0:
            return float((distances <= 0).mean()) if self.error else float(difference == 0)
        tails = [math.erfc(distance / spread / 2**0.5) / 2 for distance in distances.tolist()]
        return min(1.0, 2 * math.fsum(tails) / len(tails))

    def exceeded_with(self, level):
        """The difference that is exceeded with this probability; 1 where none is that rare."""
        low, high = 0.0, 1.0
        if self.exceeding(high) >= level:
            return 1.0
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (middle, high) if self.exceeding(middle) >= level else (low, middle)
        return high


def sides_of(a, b):
    """[(S, n) of the differences] where both ran the same seeds, else [(S, n) of a, (S, n) of b]."""
    if sorted(a.seeds) == sorted(b.seeds):
        return [b.correct[np.argsort(b.seeds)].astype(float) - a.correct[np.argsort(a.seeds)]]
    return [a.correct.astype(float), b.correct.astype(float)]


def message_deviations(a, b, sides):
    """(RESAMPLES,) deviations of the mean difference between b and a, of `sides_of`, when messages are drawn anew.

    What is peculiar to single seeds on single messages is part of `training_error`, and is taken out here, as far as
    its estimate from few seeds can be trusted: half of the variance stays in any case.
    """
    by_message = b.correct.mean(axis=0) - a.correct.mean(axis=0)
    n, variance = len(by_message), float(by_message.var())
    if n <= MAX_RESAMPLED:
        deviations = (resampling_weights(n) @ by_message.astype(np.float32) / n).astype(float)
    else:
        deviations = np.random.default_rng(SEED).standard_normal(RESAMPLES) * (variance / n) ** 0.5
    peculiar = sum(residual_variance(side) / len(side) for side in sides if len(side) > 1)
    return deviations * max(1 - peculiar / variance, 0.5) ** 0.5 if variance else deviations


def training_error(a, b, sides):
    """(standard error, degrees of freedom) of the mean difference of `sides_of` a and b when other seeds are trained.

    Two to five seeds drawn anew would vary too little (of two, half the draws are twice the same). So their mean
    deviates as Student's t with their own standard error: of the differences where both ran the same seeds, else of
    each side, with Welch's degrees of freedom. A side of one run varies as the other one, unless it is not trained by
    chance.
    """
    variances = [float(side.mean(axis=1).var(ddof=1)) if len(side) > 1 else None for side in sides]
    several = [(variance, len(side) - 1) for variance, side in zip(variances, sides, strict=True) if len(side) > 1]
    squared = []
    for sample, side, variance in zip((a, b), sides, variances, strict=False):
        if len(side) > 1:
            squared.append((variance / len(side), len(side) - 1))
        elif sample.is_trained_by_chance and several:
            squared.append(several[0])
    total = sum(error for error, _ in squared)
    if total == 0:
        return 0.0, 1.0
    if len(sides) == 2 and len(several) == 1:  # both errors come from the same seeds
        return total**0.5, float(several[0][1])
    return total**0.5, total**2 / sum(error**2 / degrees for error, degrees in squared)


def residual_variance(runs):
    """What varies in runs (S, n) beyond better and worse seeds and easier and harder messages.

    That is the residual of a two-way analysis of variance without replication.
    """
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
        corrected[i] = replace(comparisons[i], p_corrected=highest, among=len(order))
    return corrected

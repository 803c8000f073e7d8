"""What two configurations differ in: against other libraries, published examples and simulation."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm, t, ttest_ind, ttest_rel

from runner.results.accuracy import Accuracy, mean_interval
from runner.results.comparison import LEVEL, Sample, centre_and_variance, compare, holm, seed_variance
from runner.rows import QUESTIONS


def as_sample(seeds, correct):
    """A Sample of two classes from (S, n) bool."""
    return Sample(tuple(seeds), np.where(correct, -1, 0))


def sample(*wrong, seeds=None, n=300):
    """A Sample: for each run the numbers of the messages that it got wrong."""
    correct = np.ones((len(wrong), n), dtype=bool)
    for run, numbers in zip(correct, wrong, strict=True):
        run[list(numbers)] = False
    return as_sample(seeds or range(len(wrong)), correct)


def single_runs(only_a, only_b, n):
    return compare(sample(range(only_a, only_a + only_b), n=n), sample(range(only_a), n=n))


def test_mcnemar_of_a_published_example():
    """Agresti, Categorical Data Analysis, table 10.1: 150 and 86 of 1600 changed their minds."""
    found = single_runs(150, 86, 1600)
    assert found.p == pytest.approx(binomtest(86, 236).pvalue) and round(found.p, 8) == 3.716e-5
    assert found.difference == pytest.approx(-0.04) and found.verdict == "worse"
    assert found.basis == "one run each, 150 messages right only in the first, 86 only in the second"
    found = single_runs(0, 5, 300)  # the test decides where the interval excludes zero
    assert found.interval[0] > 0 and found.p == pytest.approx(0.0625) and found.verdict == "no difference shown"


@pytest.mark.parametrize("only_a, only_b, n", [(7, 1, 21), (16, 6, 161), (0, 0, 30), (0, 5, 300), (300, 0, 300)])
def test_the_interval_of_single_runs_is_the_wald_interval_with_half_a_message_more_in_each_cell(only_a, only_b, n):
    """Agresti and Min, Statistics in Medicine 24 (2005), 729-740, by the variance of multinomial proportions."""
    more, less = (only_b + 0.5) / (n + 2), (only_a + 0.5) / (n + 2)
    half = norm.ppf(0.975) * (((more + less) - (more - less) ** 2) / (n + 2)) ** 0.5
    expected = max(more - less - half, -1), min(more - less + half, 1)
    assert single_runs(only_a, only_b, n).interval == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seeds_a, seeds_b, told", [(2, 2, "2 seeds each"), (1, 5, "1 and 5 seeds")])
def test_too_few_seeds_show_nothing(seeds_a, seeds_b, told):
    """Of two seeds whose differences tie it was `+13 points, p = 1e-22`."""
    found = compare(sample(*[range(40)] * seeds_a), sample(*[[0]] * seeds_b))
    assert found.difference == pytest.approx(0.13) and found.interval[0] > 0.08
    assert (found.p, found.verdict) == (None, "no verdict")
    reason = "a verdict takes three seeds or more on both sides, or one run each"
    assert found.basis == f"{told}; {reason}"
    assert found.sentence.startswith("no verdict, +13.00 points (95% interval ") and ", p " not in found.sentence


def test_three_seeds_that_tie_are_no_more_certain_than_their_messages():
    """Each seed is better by four messages, and another four each time, or the same."""
    same = compare(sample(*[[]] * 3), sample(*[range(4)] * 3))
    other = compare(sample(*[[]] * 3), sample(range(4), range(4, 8), range(8, 12)))
    assert same.interval == single_runs(4, 0, 300).interval and same.verdict == "no difference shown"
    _, one_third = centre_and_variance(np.repeat([1 / 3, 0], [12, 288]))
    assert np.diff(other.interval)[0] == pytest.approx(2 * norm.ppf(0.975) * one_third**0.5) and other.p > 0.001


def random_samples(rng, n_seeds, shifts=(0.0, 0.5), spread=0.3, first=0, n=300):
    """A Sample for each shift in logits, on n messages of unequal difficulty; seeds begin `first` later for each."""
    logits = rng.normal(2.5, 2, n) + rng.normal(0, spread, (len(shifts), n_seeds, 1)) + np.reshape(shifts, (-1, 1, 1))
    correct = rng.random((len(shifts), n_seeds, n)) < 1 / (1 + np.exp(-logits))
    return [as_sample(range(first * i, first * i + n_seeds), runs) for i, runs in enumerate(correct)]


def interval_by_definition(a, b, level):
    """MOVER on the two-way table; (S, n) of the same seeds."""
    d = b.correct - a.correct
    n_seeds, n = d.shape
    residuals = [d[i, j] - d[i].mean() - d[:, j].mean() + d.mean() for i in range(n_seeds) for j in range(n)]
    residual = np.square(residuals).sum() / ((n_seeds - 1) * (n - 1))
    seeds = np.var(d.mean(axis=1), ddof=1) / n_seeds
    padded = np.append(d.mean(axis=0), [0.5**0.5, -(0.5**0.5)])  # sum 0, sum of squares 1
    z, q = norm.isf(level / 2), t.isf(level / 2, n_seeds - 1)
    half = (z**2 * np.var(padded) / (n + 2) + max(q**2 * seeds - z**2 * residual / n_seeds / n, 0)) ** 0.5
    return padded.mean() - half, padded.mean() + half


@pytest.mark.parametrize("seeds", [3, 4, 5])
def test_the_interval_of_the_same_seeds_is_that_of_the_definition(seeds):
    a, b = random_samples(np.random.default_rng(seeds), seeds)
    found = compare(a, b)
    assert found.interval == pytest.approx(interval_by_definition(a, b, 0.05), abs=1e-12)
    assert min(map(abs, interval_by_definition(a, b, found.p))) < 1e-6  # the level at which it touches zero


def test_the_part_of_the_seeds_is_that_of_the_t_tests():
    for first, test in ((0, ttest_rel), (10, lambda a, b: ttest_ind(a, b, equal_var=False))):
        a, b = random_samples(np.random.default_rng(7), 5, first=first)
        means = b.correct.mean(axis=1), a.correct.mean(axis=1)
        variance, _, freedom = seed_variance(a, b)
        expected = test(*means)
        assert np.subtract(*map(np.mean, means)) / variance**0.5 == pytest.approx(expected.statistic)
        assert freedom == pytest.approx(expected.df)


def test_seeds_are_paired_where_they_are_the_same():
    """In any order: two configurations that go up and down together differ with certainty, others not."""
    a, wrong = sample(*map(range, (10, 40, 70))), [range(n) for n in (80, 20, 50)]
    paired, others = compare(a, sample(*wrong, seeds=(2, 0, 1))), compare(a, sample(*wrong, seeds=(3, 4, 5)))
    assert paired.difference == others.difference == pytest.approx(-1 / 30)
    assert (paired.verdict, others.verdict) == ("worse", "no difference shown")
    assert others.interval[0] < paired.interval[0]


@pytest.mark.parametrize("first", [0, 10], ids=["same seeds", "other seeds"])
def test_of_several_seeds_the_verdict_is_that_of_the_interval_and_turns_with_the_sides(first):
    rng, verdicts = np.random.default_rng(first), set()
    for _ in range(100):
        a, b = random_samples(rng, 3, (0, rng.normal(0, 2)), rng.choice([0, 0.3]), first, n=100)
        found, turned = compare(a, b), compare(b, a)
        low, high = found.interval
        assert (found.verdict in ("better", "worse")) == (low > 0 or high < 0) and low <= found.difference <= high
        assert turned.interval == pytest.approx((-high, -low)) and turned.p == pytest.approx(found.p, abs=1e-8)
        verdicts.add(found.verdict)
    assert verdicts == {"better", "worse", "no difference shown"}


def test_the_largest_difference_is_certain_and_none_is_told():
    found = compare(sample(*[range(300)] * 3), sample(*[[]] * 3))
    assert found.difference == found.interval[1] == 1 and found.p < 1e-8 and found.verdict == "better"
    assert compare(sample(*[[0]] * 3, n=1), sample(*[[]] * 3, n=1)).verdict == "no difference shown"  # of one message
    assert compare(sample([1], [2], seeds=(5, 6)), sample([2], [1], seeds=(6, 5))).is_identical
    assert not compare(sample([1], [2], [3]), sample([1], [2], [3], seeds=(7, 8, 9))).is_identical
    a, b = sample([1]), sample([1])
    b.predicted[0, 1] = 2  # as wrong, in another way
    assert compare(a, a).is_identical and not compare(a, b).is_identical


def test_holm_of_a_published_example():
    """Wright, Biometrics 48 (1992), 1005-1013, as in the documentation of R's p.adjust."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_report_without_a_true_difference_shows_none(seeds, spread):
    """In more than 94% of reports of 19 rows, whose seeds are equally good on average."""
    rng, n_reports, n_shown = np.random.default_rng(seeds), 1500, 0
    for _ in range(n_reports):
        rows = random_samples(rng, seeds, [0] * 19, spread)
        p_values = [compare(rows[question.a - 1], rows[question.b - 1]).p for question in QUESTIONS]
        n_shown += min(holm(p_values)) < LEVEL
    assert n_shown / n_reports < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("seeds, first", [(3, 0), (3, 10), (5, 0), (5, 10)])
def test_intervals_hold_the_truth_of_all_messages_and_seeds(seeds, first, spread):
    """In more than 93% of 3,000 tables: the difference of two configurations, and the accuracy of one."""
    rng, shift, n_tables = np.random.default_rng(seeds + first), 0.5, 3000
    truth_a, truth_b = true_accuracy(spread, 0.0), true_accuracy(spread, shift)
    held = np.zeros(2)
    for _ in range(n_tables):
        a, b = random_samples(rng, seeds, (0, shift), spread, first)
        low, high = compare(a, b).interval
        below, above = mean_interval([Accuracy(run.sum(), run.size) for run in a.correct])
        held += low <= truth_b - truth_a <= high, below <= truth_a <= above
    assert (held / n_tables > 0.93).all()


def true_accuracy(spread, shift):
    """The mean over all messages and seeds of `random_samples`: logits are normal with mean 2.5 + shift."""
    logits = np.linspace(-25, 30, 20_001)
    weights = norm.pdf(logits, 2.5 + shift, np.hypot(2, spread))
    return float((weights / (1 + np.exp(-logits))).sum() / weights.sum())

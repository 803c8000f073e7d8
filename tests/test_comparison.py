"""What two configurations differ in: against other libraries, published examples and simulation."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest

from runner.results import comparison
from runner.results.accuracy import Z95
from runner.results.comparison import Sample, compare, holm, mcnemar, smallest_difference, tango_interval


@pytest.mark.parametrize("a, b", [(0, 0), (1, 0), (0, 6), (3, 3), (8, 2), (86, 150), (150, 86), (0, 300), (700, 800)])
def test_mcnemar_is_the_binomial_test(a, b):
    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_a_published_example():
    """Agresti, Categorical Data Analysis, table 10.1: 150 and 86 of 1600 changed their minds."""
    assert mcnemar(150, 86) == pytest.approx(3.716e-5, rel=1e-3)


def tango_by_likelihood(more, less, n):
    """The interval from the definition: the likeliest table with each difference is found by a general optimizer."""

    def score(delta):
        def minus_log_likelihood(q):
            cells = ((more, q + delta), (less, q), (n - more - less, 1 - 2 * q - delta))
            return -sum(count * math.log(p) if count else 0.0 for count, p in cells)

        low, high = max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12
        q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options=dict(xatol=1e-12)).x
        return (more - less - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))

    observed = (more - less) / n
    ends = ((-1 + 1e-6, observed, Z95), (observed, 1 - 1e-6, -Z95))
    return tuple(brentq(lambda delta: score(delta) - z, low, high) for low, high, z in ends)


@pytest.mark.parametrize(
    "more, less, n", [(9, 4, 300), (20, 2, 300), (1, 0, 50), (40, 60, 149), (5, 5, 30), (7, 1, 21)]
)
def test_tango_is_the_score_interval(more, less, n):
    assert tango_interval(more, less, n) == pytest.approx(tango_by_likelihood(more, less, n), abs=1e-5)


def test_tango_of_published_examples():
    """Newcombe, Statistics in Medicine 17 (1998), 2635-2650: no pair differs, and all pairs differ one way."""
    assert tango_interval(0, 0, 30) == pytest.approx((-0.1135, 0.1135), abs=1e-4)
    assert tango_interval(29, 0, 30) == pytest.approx(tango_by_likelihood(29, 0, 30), abs=1e-4)


@pytest.mark.parametrize("more, less, n", [(0, 0, 300), (3, 3, 3), (300, 0, 300), (0, 1, 1)])
def test_tango_holds_the_difference_and_stays_within_one(more, less, n):
    low, high = tango_interval(more, less, n)
    assert -1 <= low <= (more - less) / n <= high <= 1 and low < high
    assert tango_interval(less, more, n) == pytest.approx((-high, -low), abs=1e-9)


def test_holm_of_a_published_example():
    """Wright, Biometrics 48 (1992), 1005-1013, as in the documentation of R's p.adjust."""
    p_values = [0.01, 0.04, 0.03, 0.005]
    made_up = [compare(*samples([[0]], [[1]])) for _ in p_values]
    made_up = [comparison.replace(one, p=p) for one, p in zip(made_up, p_values, strict=True)]
    assert [one.p_corrected for one in holm(made_up)] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def samples(wrong_a, wrong_b, seeds=None, n=300):
    """Two Samples: for each run the numbers of the messages that it got wrong."""
    made = []
    for side, wrong in enumerate((wrong_a, wrong_b)):
        correct = np.ones((len(wrong), n), dtype=bool)
        for run, numbers in zip(correct, wrong, strict=True):
            run[numbers] = False
        made.append(Sample(tuple(seeds[side]) if seeds else tuple(range(len(wrong))), correct))
    return made


def test_one_run_each():
    a, b = [*range(20)], [*range(15, 20), *range(100, 103)]
    found = compare(*samples([a], [b]))
    assert found.only == (3, 15) and found.difference == pytest.approx(0.04)
    assert found.p == mcnemar(3, 15) and found.interval == tango_interval(15, 3, 300)
    assert found.verdict == "better"
    assert compare(*samples([b], [a])).verdict == "worse"


def test_a_difference_that_cannot_be_shown():
    found = compare(*samples([[1, 2]], [[3]]))
    assert found.verdict == "no difference that these messages can show (it would have to be 2.0 points)"
    found = compare(*samples([list(range(10))], [list(range(10, 20))]))
    assert found.smallest == pytest.approx(10 / 300)  # 15 against 5 of the 20


def test_what_could_have_been_shown_is_more_than_what_was_not():
    """Also where a difference would count if it were the only one."""
    lone = compare(*samples([list(range(12))], [[0]]))
    assert lone.verdict == "better" and lone.difference == pytest.approx(11 / 300)
    first, *_ = holm([lone] * 60)
    assert first.verdict.startswith("no difference") and first.smallest > first.difference > lone.smallest
    seeds = compare(*samples([list(range(12)), list(range(14))] * 2, [[0], [1]] * 2))
    first, *_ = holm([seeds] * 60)
    if first.verdict.startswith("no difference"):
        assert first.smallest > seeds.smallest


@pytest.mark.parametrize("discordant, n", [(0, 300), (5, 300), (6, 300), (7, 300), (20, 300), (101, 300)])
def test_the_smallest_difference_is_the_smallest_that_is_found(discordant, n):
    m = max(discordant, 6)
    difference = round(smallest_difference(discordant, n) * n)
    assert mcnemar((m - difference) // 2, (m + difference) // 2) < 0.05
    if difference > 2:
        assert mcnemar((m - difference) // 2 + 1, (m + difference) // 2 - 1) >= 0.05


def test_identical_predictions_are_told_as_that():
    assert compare(*samples([[1, 2]], [[1, 2]])).verdict == "identical predictions"
    assert compare(*samples([[1], [2]], [[2], [1]], seeds=((5, 6), (6, 5)))).verdict == "identical predictions"
    other_seeds = compare(*samples([[1], [2]], [[1], [2]], seeds=((5, 6), (7, 8))))
    assert other_seeds.verdict.startswith("no difference")
    assert compare(*samples([[1], [2]], [[1], [2], [3]])).verdict.startswith("no difference")


def test_seeds_are_paired_where_they_are_the_same():
    """Two configurations that go up and down together differ with certainty, others not."""
    a = [list(range(n)) for n in (10, 40, 70)]
    b = [list(range(n)) for n in (20, 50, 80)]
    paired = compare(*samples(a, b))
    unpaired = compare(*samples(a, b, seeds=((1, 2, 3), (4, 5, 6))))
    assert paired.difference == unpaired.difference == pytest.approx(-1 / 30)
    assert paired.verdict == "worse" and unpaired.verdict.startswith("no difference")
    low, high = paired.interval
    assert low < -1 / 30 < high and unpaired.interval[0] < low < high < unpaired.interval[1]


def test_the_interval_of_several_seeds_without_variation_is_that_of_the_messages():
    """The normal one, to which the bootstrap of a mean comes close."""
    found = compare(*samples([list(range(40))] * 3, [list(range(20, 50))] * 3))
    by_message = np.zeros(300)
    by_message[:20], by_message[40:50] = 1, -1
    half = Z95 * by_message.std() / 300**0.5
    assert found.interval == pytest.approx((1 / 30 - half, 1 / 30 + half), abs=0.002)
    assert found.p == pytest.approx(2 * 0.5 * math.erfc(1 / 30 / (half / Z95) / 2**0.5), abs=0.02)


def test_it_gives_the_same_each_time():
    both = samples([[1, 2], [3]], [[4], [5, 6, 7]])
    assert compare(*both) == compare(*both)


def simulated(rng, n_seeds, n, shift, spread):
    """One table: two configurations on n messages, of unequal difficulty, with runs of unequal quality."""
    difficulty = rng.normal(2.5, 2, n)
    quality = rng.normal(0, spread, (2, n_seeds, 1)) + np.array([0, shift])[:, None, None]
    return rng.random((2, n_seeds, n)) < 1 / (1 + np.exp(-(difficulty + quality))), quality


def true_difference(quality, difficulty):
    """Of all messages that there could be; of the seeds whose quality is given."""
    right = [np.mean([(1 / (1 + np.exp(-(difficulty + q)))).mean() for q in side.ravel()]) for side in quality]
    return right[1] - right[0]


def clear_caches():
    comparison.resampling_weights.cache_clear()
    comparison.student.cache_clear()


@pytest.mark.parametrize("seeds", [(1, 1), (2, 2), (3, 3), (5, 5), "3 and 3 others", (2, 3), (1, 3), (1, 5)], ids=str)
def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_tables(seeds, monkeypatch):
    """Of one run each the truth is that of these two classifiers, of several seeds that of all seeds."""
    first, is_paired = (3, False) if isinstance(seeds, str) else (0, True)
    n_a, n_b = (3, 3) if isinstance(seeds, str) else seeds
    monkeypatch.setattr(comparison, "RESAMPLES", 500)
    clear_caches()
    rng = np.random.default_rng(n_a + 10 * n_b + first)
    shift, spread, n_tables = 0.5, 0.3, 1000
    everything = rng.normal(2.5, 2, 20_000)
    all_seeds = rng.normal(0, spread, 300)
    truth, held = true_difference(np.stack([all_seeds, all_seeds + shift]), everything), 0
    for _ in range(n_tables):
        correct, quality = simulated(rng, max(n_a, n_b), 300, shift, spread)
        if n_a == n_b == 1:
            truth = true_difference(quality, everything[:2000])
        a = Sample(tuple(range(n_a)), correct[0][:n_a])
        b = Sample(tuple(range(n_b)) if is_paired else tuple(range(10, 10 + n_b)), correct[1][:n_b])
        low, high = compare(a, b).interval
        held += low <= truth <= high
    clear_caches()
    assert 0.92 <= held / n_tables <= 0.98

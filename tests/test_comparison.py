"""What two configurations differ in: against other libraries, published examples, numbers by hand and simulation."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, norm, t, ttest_ind

from runner.results.accuracy import Accuracy, mean_interval
from runner.results.comparison import (
    MeanVariance,
    Sample,
    Variances,
    compare,
    describe_power,
    holm,
    seed_variances,
)


def as_sample(seeds, correct, mean_variance=None, name="row 1"):
    """A Sample of two classes from (S, n) bool."""
    mean_variance = mean_variance or seed_variances([correct.mean(axis=1)])[0]
    return Sample(name, tuple(seeds), np.where(correct, -1, 0), mean_variance)


def sample(*wrong, seeds=None, n=300, **further):
    """A Sample: for each run the indices of the messages that it got wrong."""
    correct = np.ones((len(wrong), n), dtype=bool)
    for run, indices in zip(correct, wrong, strict=True):
        run[list(indices)] = False
    return as_sample(seeds or range(len(wrong)), correct, **further)


def single_runs(only_a, only_b, n):
    return compare(sample(range(only_a, only_a + only_b), n=n), sample(range(only_a), n=n, name="row 16"))


def test_mcnemar_of_a_published_example():
    """Agresti, Categorical Data Analysis, table 10.1: 150 and 86 of 1600 changed their minds."""
    found = single_runs(150, 86, 1600)
    assert found.p == pytest.approx(binomtest(86, 236).pvalue) and round(found.p, 8) == 3.716e-5
    assert found.difference == pytest.approx(-0.04)


@pytest.mark.parametrize("only_a, only_b, n", [(16, 6, 161), (0, 0, 30), (300, 0, 300)])
def test_the_interval_of_single_runs_is_the_wald_interval_with_half_a_message_more_in_each_cell(only_a, only_b, n):
    """Agresti and Min, Statistics in Medicine 24 (2005), 729-740, by the variance of multinomial proportions."""
    more, less = (only_b + 0.5) / (n + 2), (only_a + 0.5) / (n + 2)
    half = norm.ppf(0.975) * (((more + less) - (more - less) ** 2) / (n + 2)) ** 0.5
    expected = max(more - less - half, -1), min(more - less + half, 1)
    assert single_runs(only_a, only_b, n).interval == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seeds_a, seeds_b", [(2, 2), (1, 5)])
def test_too_few_seeds_show_nothing(seeds_a, seeds_b):
    """Of two seeds whose differences tie it was `+13 points, p = 1e-22`."""
    found = compare(sample(*[range(40)] * seeds_a), sample(*[[0]] * seeds_b))
    assert found.difference == pytest.approx(0.13) and found.interval[0] > 0.08
    assert found.p is None and found.verdict == "no verdict" and describe_power([found], 0.05) == ""


# --- the variance by seeds ---


def test_the_variances_of_five_configurations_are_shrunk_towards_their_mean():
    """By hand: variances of 1, 4, 9, 16 and 0 points² have the mean 6, a single run is not among them."""
    two, three, ten = [90, 90 + 8**0.5], [90, 92, 94], np.array([90, 96] * 5)
    ten = 90 + (ten - 93) * (9 / ten.var(ddof=1)) ** 0.5
    found = seed_variances([[90, 91, 92], two, three, [80, 84, 88], [70] * 3, [50]])
    expected = [(1, 3), (4, 2), (4, 3), (16, 3), (0, 3)]
    mean = (1 + 4 + 4 + 16 + 0) / 5
    for (variance, freedom), (own, n) in zip(found, expected):
        assert variance == pytest.approx((mean + (n - 1) * own) / n / n) and freedom == n
    assert found[5] == MeanVariance(0.0, 1.0)
    fewer = seed_variances([[90, 91, 92], [90, 92, 94], [80, 84, 88], [70] * 3, [50], [60]])
    assert fewer[:4] == [(1 / 3, 2), (4 / 3, 2), (16 / 3, 2), (0, 2)]  # fewer than five keep their own
    assert seed_variances([[90, 91, 92]] * 4 + [ten])[4] == pytest.approx(((1 * 4 + 9) / 5 / 100 + 9 * 9 / 100, 10))


def random_samples(rng, n_seeds, shifts=(0.0, 0.5), spread=0.3, n=300):
    """A Sample for each shift in logits, on n messages of unequal difficulty."""
    logits = rng.normal(2.5, 2, n) + rng.normal(0, spread, (len(shifts), n_seeds, 1)) + np.reshape(shifts, (-1, 1, 1))
    correct = rng.random((len(shifts), n_seeds, n)) < 1 / (1 + np.exp(-logits))
    variances = seed_variances([runs.mean(axis=1) for runs in correct])
    return [as_sample(range(n_seeds), *both) for both in zip(correct, variances)]


def residual(correct):
    """The mean square that is neither of a seed nor of a message, over the size of the two-way table (S, n)."""
    n_seeds, n = correct.shape
    rows, columns, mean = correct.mean(axis=1), correct.mean(axis=0), correct.mean()
    squares = [(correct[i, j] - rows[i] - columns[j] + mean) ** 2 for i in range(n_seeds) for j in range(n)]
    return sum(squares) / ((n_seeds - 1) * (n - 1)) / (n_seeds * n)


@pytest.mark.parametrize("n_configurations, n_seeds", [(2, 4), (6, 3)])
def test_the_interval_is_that_of_the_definition(n_configurations, n_seeds):
    """Of two configurations, whose variances are their own, and of six; the spread is large enough to count."""
    samples = random_samples(np.random.default_rng(n_seeds), n_seeds, np.linspace(0, 1, n_configurations), 0.6)
    a, b = samples[0], samples[-1]
    own = [one.correct.mean(axis=1).var(ddof=1) for one in samples]
    prior = 1 if n_configurations == 6 else 0
    freedom = n_seeds - 1 + prior
    shrunk = [(prior * np.mean(own) + (n_seeds - 1) * v) / freedom / n_seeds for v in (own[0], own[-1])]
    welch = sum(shrunk) ** 2 / sum(v**2 / freedom for v in shrunk)
    padded = np.append(b.correct.mean(axis=0) - a.correct.mean(axis=0), [0.5**0.5, -(0.5**0.5)])
    both = residual(a.correct) + residual(b.correct)

    def interval(level):
        z, q = norm.isf(level / 2), t.isf(level / 2, welch)
        half = (z**2 * np.var(padded) / len(padded) + q**2 * sum(shrunk) - z**2 * both) ** 0.5
        return padded.mean() - half, padded.mean() + half

    found = compare(a, b)
    assert found.interval == pytest.approx(interval(0.05), abs=1e-12)
    assert min(map(abs, interval(found.p))) < 1e-6  # the level at which it touches zero
    if n_configurations == 2:
        assert found.variances.freedom == pytest.approx(
            ttest_ind(a.correct.mean(axis=1), b.correct.mean(axis=1), equal_var=False).df
        )
    mean = Accuracy(a.correct.mean() * 300, 300)
    by_seeds = t.isf(0.025, freedom) ** 2 * shrunk[0] - norm.isf(0.025) ** 2 * residual(a.correct)
    below, above = (by_seeds + (mean.fraction - np.array(mean.interval)) ** 2) ** 0.5
    found = mean_interval(mean, a.mean_variance, a.residual)
    assert found == pytest.approx((mean.fraction - below, min(mean.fraction + above, 1)))


def test_seeds_that_agree_are_no_more_certain_than_their_messages():
    """Each seed is better by the same four messages, or by four others: the messages alone decide."""
    found = compare(sample(*[[]] * 3), sample(*[range(4)] * 3))
    assert found.interval == single_runs(4, 0, 300).interval
    other = compare(sample(*[[]] * 3), sample(range(4), range(4, 8), range(8, 12)))
    padded = np.append(np.repeat([1 / 3, 0], [12, 288]), [0.5**0.5, -(0.5**0.5)])
    assert np.diff(other.interval)[0] == pytest.approx(2 * norm.ppf(0.975) * (padded.var() / 302) ** 0.5)
    assert compare(sample(*[[0]] * 3, n=1), sample(*[[]] * 3, n=1)).p > 0.05  # of one message


def test_seeds_with_the_same_number_are_not_paired():
    a = sample(*map(range, (10, 40, 70)))
    found = [compare(a, sample(*map(range, (20, 50, 80)), seeds=seeds)) for seeds in ((0, 1, 2), (7, 8, 9))]
    assert found[0].interval == found[1].interval and found[0].p == found[1].p > 0.5


def test_a_baseline_has_no_variance_by_seeds():
    """Three seeds on the other side are enough for a verdict, two are not; one is compared run by run."""
    baseline = sample(range(40), seeds=(None,), name="linear SVM")
    runs = [range(10), range(4, 16), range(11)]
    found = compare(baseline, sample(*runs))
    assert found.variances.seeds == sample(*runs).mean_variance.variance and found.variances.freedom == 2
    assert found.verdict == "better" and found.sentence.endswith("; 3 seeds.")
    assert compare(baseline, sample(*runs[:2])).p is None
    assert compare(baseline, sample(runs[0])).basis.endswith("only in linear SVM, 30 only in row 1")


# --- verdicts ---


def test_the_verdict_turns_with_the_sides_and_the_interval_agrees_with_it():
    rng, verdicts = np.random.default_rng(0), set()
    for _ in range(100):
        a, b = random_samples(rng, 3, (0, rng.normal(0, 2)), rng.choice([0, 0.3]), n=100)
        found, turned = compare(a, b), compare(b, a)
        low, high = found.interval
        assert (found.verdict in ("better", "worse")) == (low > 0 or high < 0) and low <= found.difference <= high
        assert turned.interval == pytest.approx((-high, -low)) and turned.p == pytest.approx(found.p, abs=1e-8)
        assert (found.verdict == "better") == (found.difference > 0 and found.p < 0.05)
        verdicts.add(found.verdict)
    assert verdicts == {"better", "worse", "undecided"}


SEEDS = sample(range(30), range(28), range(31)), sample(range(18), range(20), range(19), name="row 16")
SENTENCES = [  # of the Comparison with this corrected p
    (compare(*SEEDS), 0.012, "3.56 points better (95% interval 1.3 to 5.8), p = 0.012; 3 seeds each."),
    (compare(*SEEDS[::-1]), 0.2, "probably worse, by 3.56 points (95% interval 1.3 to 5.8), p = 0.2; 3 seeds each."),
    (single_runs(150, 86, 1600), 1e-4, "4.00 points worse (95% interval 2.1 to 5.9), p < 0.001; these two runs alone"),
    (single_runs(4, 3, 100), 1.0, "undecided: between 6.4 points worse and 4.5 better (95% interval), measured 1.00 "),
    # The interval includes zero, and the test decides.
    (single_runs(2, 0, 100), 0.04, "2.00 points worse (95% interval 5.3 worse to 1.3 better), p = 0.04; these two "),
    (compare(sample([1], [2]), sample([3], [4])), None, "no verdict: no difference (95% interval of these runs alone"),
]


@pytest.mark.parametrize("found, p, sentence", SENTENCES, ids=[sentence[:20] for _, _, sentence in SENTENCES])
def test_a_verdict_in_words(found, p, sentence):
    """The corrected p decides; where the interval excludes zero all the same, the verdict is a probable one."""
    assert replace(found, p=p).sentence.startswith(sentence)


def test_the_same_predictions_of_the_same_seeds_are_told():
    """In any order of the seeds; other mistakes are no same predictions, nor are other seeds."""
    found = compare(sample([1], [2], seeds=(5, 6)), sample([2], [1], seeds=(6, 5)))
    assert found.is_same and found.sentence.startswith("the same predictions (2 seeds each")
    assert not compare(sample([1], [2], [3]), sample([1], [2], [3], seeds=(7, 8, 9))).is_same
    a, b = sample([1]), sample([1])
    b.predicted[0, 1] = 2  # as wrong, in another way
    assert compare(a, a).is_same and not compare(a, b).is_same
    assert compare(a, a).sentence == "the same predictions (one run each)."


def test_holm_of_a_published_example():
    """Wright, Biometrics 48 (1992), 1005-1013, as in the documentation of R's p.adjust."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []


# --- what the runs can show ---


def test_what_the_seeds_show_is_the_median_half_width():
    """By hand: half-widths of 5, 7 and 12 points by messages alone; more seeds narrow what differs by seed."""
    z, found = norm.isf(0.005), compare(sample(*[[]] * 3), sample(*[range(4)] * 3))

    def told(*points, both=0.0):
        squares = [(x / 100 / z) ** 2 for x in points]
        return describe_power([replace(found, variances=Variances(s, 0.0, both * s)) for s in squares], 0.01)

    words = told(5, 7, 12)
    assert words.startswith("These seeds can show a difference of about 7.0 points or more; ")
    assert "takes more test messages" in words
    # All of the variance by messages is what single seeds make of single messages: 3 (5 / 3)² = 8.3 seeds.
    assert told(5, both=1.0).endswith("; to show 3 points takes about 9 seeds for each row.")
    assert told(2).endswith("; to show 3 points takes about 3 seeds for each row.")
    single = single_runs(12, 3, 300)
    half, words = 100 * single.variances.half_width(0.01), describe_power([single], 0.01)
    assert words.startswith(f"These single runs can show a difference of about {half:.1f} points")

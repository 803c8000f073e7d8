"""Accuracies and their intervals, and the single mistakes."""

import pytest
import torch
from helpers import made_up_confusion
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import additional_experiments as ae
from runner.results.accuracy import Accuracy, Confusion, Mistake, describe_mistakes


def test_accuracy_is_printed_in_percent():
    assert str(Accuracy(285, 300)) == "95.00%"
    assert Accuracy(1, 3).fraction == pytest.approx(1 / 3)
    assert str(Accuracy(0, 0)) == "nan%"  # nothing was measured


def test_accuracy_in_full():
    assert Accuracy(285, 300).in_full == "95.00% (285/300, 95% interval 91.9–96.9)"
    assert Accuracy(0, 0).interval == (0, 1)
    assert Accuracy(300, 300).interval[1] == 1 and Accuracy(0, 3).interval[0] == 0  # exactly, and not by a hair


@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (0, 300), (300, 300), (285, 300), (17, 149), (3, 7)])
def test_interval_is_that_of_scipy(correct, total):
    theirs = binomtest(correct, total).proportion_ci(method="wilson")
    assert Accuracy(correct, total).interval == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(
    "correct, total, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_is_the_published_one(correct, total, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=5e-5)


# --- mistakes ---


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1), st.randoms(use_true_random=False))
def test_counts_and_accuracy_follow_from_the_mistakes(pairs, order):
    """Of any messages in any order, those without a label left out."""
    numbers = order.sample(range(len(pairs)), len(pairs))
    labels, called = zip(*pairs, strict=True)
    confusion = Confusion.of(numbers, labels, called, [0.5] * len(pairs), n_classes=4)
    labelled = [pair for pair in pairs if pair[0] >= 0]
    assert confusion.counts == [[labelled.count((label, c)) for c in range(4)] for label in range(4)]
    assert confusion.accuracy == Accuracy(sum(a == b for a, b in labelled), len(labelled))
    assert [m.number for m in confusion.mistakes] == sorted(m.number for m in confusion.mistakes)


def test_the_confusion_of_predictions():
    """Equal to the accuracy that is counted without it; the number is the message's, not its place in the loader."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 30.0], [0.0, 1.0], [5.0, 5.0], [1.0, 0.0]])
    predictions = ae.Predictions(logits, torch.tensor([0, 0, 1, 1, -100]), [5], torch.tensor([7, 3, 5, 1, 2]))
    confusion = ae.confusion(predictions)
    assert confusion.totals == (2, 2) and confusion.accuracy == ae.accuracy(predictions) == Accuracy(2, 4)
    first, second = confusion.mistakes
    assert (first, second.number, second.label, second.called) == (Mistake(1, 1, 0, 0.5), 3, 0, 1)
    assert 0 < 1 - second.confidence < 1e-12  # in double precision, so that certain mistakes can still be ranked


def test_two_classes_are_told_in_words():
    confusion = made_up_confusion({0: 0.9, 2: 0.8, 3: 0.7}, totals=(151, 149))
    assert confusion.describe(["ham", "spam"]) == ["errors: 2 of 151 ham called spam, 1 of 149 spam called ham"]


def test_more_classes_are_a_table():
    confusion = Confusion((3, 0, 10), (Mistake(0, 0, 2, 0.5), Mistake(1, 2, 0, 0.5), Mistake(2, 2, 0, 0.6)))
    assert confusion.describe(["0", "1", "two"]) == [
        "errors:",
        "  label  called 0  called 1  called two   errors",
        "      0         2         0           1   1 of 3",
        "      1         0         0           0   0 of 0",
        "    two         2         0           8  2 of 10",
    ]


def test_many_classes_have_no_columns():
    confusion = Confusion((1,) * 11, (Mistake(0, 10, 0, 0.5),))
    assert confusion.describe([str(n) for n in range(11)]) == [
        "errors: " + ", ".join(f"{n}: 0 of 1" for n in range(10)) + ", 10: 1 of 1"
    ]


def test_the_most_confident_mistakes_are_named():
    confusion = made_up_confusion({1: 0.6, 4: 0.9994, 5: 0.7, 8: 0.9})
    texts = [f"text {number}" for number in range(9)]
    texts[4], texts[8] = "\x1b[31mred\n\u202eback " + "a" * 100, "é ü 🙂"
    assert describe_mistakes(confusion, ["ham", "spam"], texts)[1:] == [
        "Most confident test mistakes:",
        "  0.999 spam, labelled ham: \\x1b[31mred\\n\\u202eback " + "a" * 36 + "…",
        "  0.900 spam, labelled ham: é ü 🙂",
        "  0.700 ham, labelled spam: text 5",
    ]
    assert len(describe_mistakes(made_up_confusion({}), ["ham", "spam"], texts)) == 1

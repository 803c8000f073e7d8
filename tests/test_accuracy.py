"""Accuracies and their intervals, and the single mistakes."""

import numpy as np
import pytest
import torch
from helpers import made_up_confusion, made_up_record
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t
from sklearn.metrics import f1_score, precision_recall_fscore_support

import additional_experiments as ae
from runner.data.datasets import Duplicates
from runner.results.accuracy import Accuracy, Confusion, Mistake, describe_accuracies, describe_mistakes, mean_interval


@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (0, 300), (300, 300), (285, 300), (17, 149), (3, 7)])
def test_interval_is_that_of_scipy(correct, total):
    low, high = Accuracy(correct, total).interval
    theirs = binomtest(correct, total).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert str(Accuracy(0, 0)) == "n/a" and Accuracy(285, 300).in_full == "95.00% (285/300, 95% interval 91.9–96.9)"
    assert (correct > 0 or low == 0) and (correct < total or high == 1)  # exactly, and not by a hair


def test_the_interval_of_a_mean_covers_messages_and_seeds():
    """Squared and added, what is in both only once; where seeds vary by no more it is that of the messages."""
    mean, residual = Accuracy(275, 300), 1e-5
    low, high = mean.interval
    by_seeds = (t.isf(0.025, 3) ** 2 * 0.01**2 - norm.isf(0.025) ** 2 * residual) ** 0.5
    expected = [275 / 300 + sign * np.hypot(by_seeds, 275 / 300 - end) for sign, end in ((-1, low), (1, high))]
    assert mean_interval(mean, (0.01**2, 3), residual) == pytest.approx(expected)
    assert mean_interval(mean, (1e-6, 3), residual) == pytest.approx((low, high))
    assert mean_interval(Accuracy(225, 300), (0.1, 1), 0.0) == (0, 1)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1), st.randoms(use_true_random=False))
def test_counts_and_accuracy_follow_from_the_mistakes(pairs, order):
    """For any messages in any order; those without a label do not count."""
    indices = order.sample(range(len(pairs)), len(pairs))
    labels, predicted = zip(*pairs, strict=True)
    confusion = Confusion.from_predictions(indices, labels, predicted, [0.5] * len(pairs), n_classes=4)
    labelled = [pair for pair in pairs if pair[0] >= 0]
    assert confusion.totals == [sum(label == each for label, _ in labelled) for each in range(4)]
    assert confusion.accuracy == Accuracy(sum(a == b for a, b in labelled), len(labelled))
    assert [m.index for m in confusion.mistakes] == sorted(m.index for m in confusion.mistakes)
    if labelled:
        true, predicted = zip(*labelled, strict=True)
        assert confusion.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))
        theirs = precision_recall_fscore_support(true, predicted, labels=range(4), zero_division=np.nan)[:2]
        ours = [[float(one.fraction) for one in of_class] for of_class in confusion.precision_and_recall]
        np.testing.assert_allclose(np.transpose(ours), theirs)


def test_the_confusion_of_predictions():
    """The index is the message's, not its place in the loader."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 30.0], [0.0, 1.0], [5.0, 5.0], [1.0, 0.0]])
    predictions = ae.Predictions(logits, torch.tensor([0, 0, 1, 1, -100]), [5], torch.tensor([7, 3, 5, 1, 2]))
    confusion = ae.confusion(predictions)
    assert confusion.totals == [2, 2] and confusion.accuracy == Accuracy(2, 4)
    first, second = confusion.mistakes
    assert first == Mistake(1, 1, 0, 0.5) and second[:3] == (3, 0, 1)
    assert 0 < 1 - second.confidence < 1e-12  # in double precision, so that certain mistakes can still be ranked


def lines_of(confusion, *class_names, texts=(), similar=()):
    """Return the lines on the test split of a record, and those on its mistakes."""
    confusions = {split: made_up_confusion({}) for split in ("train", "validation")} | dict(test=confusion)
    duplicates = dict(validation=Duplicates(), test=Duplicates((), similar))
    fields = dict(class_names=list(class_names), confusions=confusions, duplicates=duplicates, texts=list(texts))
    record = made_up_record(**fields)
    return describe_accuracies(record)[3:], describe_mistakes(record)


def test_errors_repeated_messages_and_the_most_confident_mistakes():
    confusion = made_up_confusion({0: 0.6, 4: 0.9994, 5: 0.7, 8: 0.9}, totals=(151, 149))
    texts = ["\x1b[31mred\n\u202eback " + "a" * 100, "é ü 🙂", "text 5", "text 0"]  # the most confident first
    assert lines_of(confusion, "ham", "spam", texts=texts, similar=(0, 1)) == (
        [
            "Test accuracy without the 2 that are like training messages: 98.99% (295/298, 95% interval 97.1–99.7)",
            "Test errors: 3 of 151 ham predicted as spam, 1 of 149 spam predicted as ham",
            "Test precision and recall: ham 99.33% and 98.01%, spam 98.01% and 99.33%",
        ],
        [
            "Most confident test mistakes:",
            "  0.999 spam, labelled ham: \\x1b[31mred\\n\\u202eback " + "a" * 36 + "…",
            "  0.900 spam, labelled ham: é ü 🙂",
            "  0.700 ham, labelled spam: text 5",
        ],
    )


def test_test_messages_that_are_all_like_training_messages_leave_no_accuracy():
    lines, _ = lines_of(made_up_confusion({}, totals=(1, 1)), "ham", "spam", similar=(0, 1))
    assert lines[0] == "Test accuracy without the 2 that are like training messages: n/a"


def test_a_classifier_that_never_finds_the_rare_class_is_no_success():
    confusion = Confusion([294, 6], [Mistake(number, 1, 0, 0.9) for number in range(6)])
    [frequent, f1, errors, classes], _ = lines_of(confusion, "ham", "spam")
    assert frequent == "Test accuracy of always the most frequent class: 98.00%"
    assert f1 == "Test macro-averaged F1: 0.495" and errors == "Test errors: 6 of 6 spam predicted as ham"
    assert classes == "Test precision and recall: ham 98.00% and 100.00%, spam n/a and 0.00%"


@pytest.mark.parametrize("n_wrong, is_told", [(130, True), (110, False)])
def test_the_most_frequent_class_is_told_where_the_classifier_may_do_no_better(n_wrong, is_told):
    """The intervals are 51.0–62.2 and 57.7–68.6: only the second lies above the 55% of the class."""
    confusion = Confusion([165, 135], [Mistake(number, 1, 0, 0.9) for number in range(n_wrong)])
    told = "Test accuracy of always the most frequent class: 55.00%" in lines_of(confusion, "a", "b")[0]
    assert told == is_told


def test_numbers_as_labels_are_told_from_counts():
    lines, mistakes = lines_of(Confusion([5, 5], [Mistake(0, 0, 1, 0.5)]), "-1", "1", texts=["a"])
    assert "Test errors: 1 of 5 class -1 predicted as class 1" in lines
    assert mistakes[1] == "  0.500 class 1, labelled class -1: a"


def test_errors_of_more_classes_begin_with_the_most_frequent_pair_and_count_the_rest():
    confusion = Confusion([3, 0, 10], [Mistake(0, 0, 2, 0.5), Mistake(1, 2, 0, 0.5), Mistake(2, 2, 0, 0.6)])
    assert confusion.describe(["0", "1", "two"]) == "2 of 10 two predicted as 0, 1 of 3 0 predicted as two"
    assert not any("precision" in line for line in lines_of(confusion, "0", "1", "two")[0])
    many = Confusion([3] * 13, [Mistake(n, n % 13, 0, 0.5) for n in range(1, 36) if n % 13])  # three of 1 to 9
    words = many.describe([f"class {n}" for n in range(13)]).split(", ")
    assert words[0] == "3 of 3 class 1 predicted as class 0" and words[9] == "2 of 3 class 10 predicted as class 0"
    assert words[10:] == ["and 4 in 2 other pairs of classes"]
    assert Confusion([1, 1], []).describe(["a", "b"]) == "none"

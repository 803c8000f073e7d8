"""Accuracies and their intervals, the history of a run, and its way through JSON."""

import json

import pytest
from helpers import made_up_record
from scipy.stats import binomtest

from runner.records import Accuracy, History, Record


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


def test_records_and_their_history_survive_json():
    history = History()
    line = history.add_losses(epoch=1, step=50, train_loss=0.25, val_loss=0.125)
    assert line == "Ep 1 (Step 000050): Train loss 0.250, Val loss 0.125"
    history.add_accuracies(Accuracy(30, 40), Accuracy(35, 40))
    record = made_up_record("x", history=history)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record

    lengths = history.lengths
    history.add_losses(epoch=2, step=100, train_loss=0.1, val_loss=0.1)
    assert History.from_dict(json.loads(json.dumps(history.to_dict(lengths)))) == record.history.__class__(
        [50], [0.25], [0.125], [Accuracy(30, 40)], [Accuracy(35, 40)], history.lines[:2]
    )

"""The history of a run, and a record's way through JSON."""

import json

from helpers import made_up_record, made_up_run

from runner.results.accuracy import Accuracy
from runner.results.records import History, Record


def test_records_and_their_history_survive_json():
    history = History()
    line = history.add_losses(epoch=1, step=50, train_loss=0.25, val_loss=0.125)
    assert line == "Ep 1 (Step 000050): Train loss 0.250, Val loss 0.125"
    history.add_accuracies(Accuracy(30, 40), Accuracy(35, 40))
    record = made_up_record("x", history=history)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    record = made_up_run("x", [1, 2, 7], history=history)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record

    lengths = history.lengths
    history.add_losses(epoch=2, step=100, train_loss=0.1, val_loss=0.1)
    assert History.from_dict(json.loads(json.dumps(history.to_dict(lengths)))) == record.history.__class__(
        [50], [0.25], [0.125], [Accuracy(30, 40)], [Accuracy(35, 40)], history.lines[:2]
    )

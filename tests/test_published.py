"""The published figures, with the real weights and the real collection: `python -m pytest -m network`.

It downloads 0.5 GB once. Nothing here has run where the project was made, because there is no network.
"""

import pytest

from additional_experiments import Experiment, run
from runner.data.datasets import SPLITS
from runner.options import RunOptions
from runner.rows import ROWS


@pytest.mark.network
@pytest.mark.parametrize("number", [1, 16])
def test_row(number, capsys):
    row = ROWS[number]
    [record] = run(Experiment(**row.options), RunOptions(results="", feature_cache=""))
    published = dict(train=row.train, validation=row.validation, test=row.test)
    found = {split: 100 * getattr(record, split).fraction for split in SPLITS}
    with capsys.disabled():
        for split, percent in found.items():
            # The published percentages have two decimals.
            words = "equal to the example" if round(percent, 2) == published[split] else "another number of messages"
            print(f"\nRow {number}, {split}: {percent:.2f}%, published {published[split]:.2f}%: {words}")
    assert record.data == "uci" and record.history.train_losses[-1] < record.history.train_losses[0]
    assert found == pytest.approx(published, abs=1.5)

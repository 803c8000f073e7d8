"""The pictures."""

import re

import pytest
from helpers import made_up_record
from test_report import FIRST_ROWS, six_records, standing_of

from runner.parsers import IMAGE_FORMATS
from runner.results import pictures
from runner.results.accuracy import Accuracy
from runner.results.records import History

SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


@pytest.mark.parametrize("suffix", IMAGE_FORMATS)
def test_pictures(tmp_path, suffix):
    history = History(
        steps=[0, 50, 100],
        train_losses=[1.0, 0.5, 0.1],
        val_losses=[1.0, 0.6, 0.4],
        train_accuracies=[Accuracy(30, 40)],
        val_accuracies=[Accuracy(35, 40)],
    )
    record = made_up_record("x", history=history)
    pictures.plot_histories(tmp_path / f"one{suffix}", [record], n_train=847)
    pictures.plot_histories(tmp_path / f"seeds{suffix}", [record, record], n_train=847)
    pictures.plot_report(tmp_path / f"report{suffix}", standing_of(*six_records(tmp_path / "r.csv")), FIRST_ROWS)
    pictures.plot_report(tmp_path / f"nothing{suffix}", standing_of(), FIRST_ROWS)
    drawn = [path for path in tmp_path.iterdir() if path.suffix == suffix]
    assert len(drawn) == 4 and all(path.read_bytes().startswith(SIGNATURES[suffix]) for path in drawn)


def test_report_picture_names_each_row(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as letters
        pictures.plot_report(tmp_path / "report.svg", standing_of(*six_records(tmp_path / "r.csv")), FIRST_ROWS)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "report.svg").read_text())
    for text in (
        "last block, last token (n\u00a0=\u00a02)   1",
        "last layer   3",
        "published",
    ):
        assert text in texts


def test_report_picture_takes_any_path(tmp_path):
    record = made_up_record("x", row=None, configuration="{0} {braces} 100% $x^2$ weights, \\frac")
    pictures.plot_report(tmp_path / "report.svg", standing_of(record), FIRST_ROWS)
    assert "<svg" in (tmp_path / "report.svg").read_text()

"""Pictures of runs and of the table."""

import re
from pathlib import Path

import matplotlib
import pytest
from helpers import made_up_record
from test_summary import nano, row

from runner.options import IMAGE_FORMATS
from runner.results import pictures
from runner.results.records import History
from runner.results.summary import summarize

SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


def texts_in(draw, *arguments):
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as letters
        draw("picture.svg", *arguments)
    return re.findall(r"<text[^>]*>([^<]*)</text>", Path("picture.svg").read_text())


def histories(n):
    history = History([0, 50, 100], [1.0, 0.5, 0.1], [1.0, 0.6, 0.4], [[30, 40]], [[35, 40]])
    return [made_up_record(history=history)] * n


@pytest.mark.parametrize("suffix", IMAGE_FORMATS)
def test_pictures_in_each_format(tmp_path, suffix):
    pictures.plot_histories(tmp_path / f"one{suffix}", histories(1), 847)
    pictures.plot_summary(tmp_path / f"nothing{suffix}", summarize([]))
    assert all(path.read_bytes().startswith(SIGNATURES[suffix]) for path in tmp_path.iterdir())


def test_the_course_of_training_says_what_was_measured():
    texts = texts_in(pictures.plot_histories, histories(3), 847)
    assert {"training", "validation", "3 seeds", "Loss", "Messages seen", "first 40 messages"} <= set(texts)


def test_the_picture_names_each_row_and_has_no_legend_for_what_is_not_drawn():
    texts = texts_in(pictures.plot_summary, summarize([row(1, seed=1), row(1, seed=2), row(3), nano(1), nano(2)]))
    rows = {"last block, last token 1", "last layer 3", "last block, last token 1 6 7 8", "The table:"}
    assert rows | {"published", "single seeds"} <= set(texts)
    texts = texts_in(pictures.plot_summary, summarize([nano(1)]))
    assert "published" not in texts and "single seeds" not in texts and "measured, 95% interval" in texts


def test_the_picture_takes_any_name():
    record = made_up_record(
        options=dict(weights="{0} 100% $x^2$ \\frac"), row=None, configuration="{0} 100% $x^2$ \\frac"
    )
    assert "{0} 100% $x^2$ \\frac" in texts_in(pictures.plot_summary, summarize([record]))

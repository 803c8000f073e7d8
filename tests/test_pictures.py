"""Pictures of runs and of the table."""

import re
from pathlib import Path

import matplotlib
from helpers import made_up_record
from test_summary import nano, row

from runner.results import pictures
from runner.results.records import History
from runner.results.summary import summarize


def texts_in(draw, *arguments):
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as letters
        draw("picture.svg", *arguments)
    return re.findall(r"<text[^>]*>([^<]*)</text>", Path("picture.svg").read_text())


def test_the_course_of_training_says_what_was_measured():
    history = History([0, 50, 100], [1.0, 0.5, 0.1], [1.0, 0.6, 0.4], [[30, 40]], [[35, 40]])
    texts = texts_in(pictures.plot_histories, [made_up_record(history=history)] * 3, 847)
    assert {"training", "validation", "3 seeds", "Loss", "Messages seen", "first 40 messages"} <= set(texts)


def test_the_picture_names_each_row_and_has_no_legend_for_what_is_not_drawn():
    name = "{0} 100% $x^2$ \\frac \x1b"  # whatever it is
    other = made_up_record(options=dict(weights=name), row=None, configuration=name)
    summary = summarize([row(1, seed=1), row(1, seed=2), row(3), nano(1), nano(2), other])
    names = {"1  last block, last token", "3  last layer", "The table:", name.replace("\x1b", "\\x1b")}
    assert names | {"published", "single seeds"} <= set(texts_in(pictures.plot_summary, summary))
    texts = texts_in(pictures.plot_summary, summarize([nano(1)]))
    assert "published" not in texts and "single seeds" not in texts and "measured, 95% interval" in texts
    assert "Test accuracy (%)" in texts_in(pictures.plot_summary, summarize([]))


def test_an_interval_that_would_squeeze_the_others_is_cut():
    """Two seeds whose accuracies differ widely."""
    narrow = [row(n, range(9), seed=seed) for n in (1, 2, 3) for seed in (1, 2, 3)]
    wide = [row(1, range(n), seed=seed, lora_rank=4) for seed, n in ((1, 10), (2, 30))]
    for records, n_cut in ((narrow, 0), (narrow + wide, 1)):
        pictures.plot_summary("picture.svg", summarize(records))
        assert Path("picture.svg").read_text().count('id="cut"') == n_cut

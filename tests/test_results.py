"""The printed row."""

from dataclasses import replace

import pytest

from results import Accuracy, Published, Result, markdown_header, markdown_row

RESULT = Result(
    row=1,
    model_size="gpt2-small (124M)",
    weights="pretrained",
    position="last",
    layers="last_block",
    context="longest train ex. (120)",
    train=Accuracy(1005, 1040),
    validation=Accuracy(148, 149),
    test=Accuracy(285, 300),
    minutes=0.284,
    device="A100",
    remarks="",
    published=Published(96.63, 99.33, 95.00, 0.28),
)


def test_accuracy_is_printed_in_percent():
    assert str(Accuracy(285, 300)) == "95.00%"
    assert Accuracy(1, 3).fraction == pytest.approx(1 / 3)
    assert str(Accuracy(0, 0)) == "nan%"  # nothing was measured


def test_row_with_the_published_figures_beside_it():
    assert markdown_row(RESULT) == (
        "| 1 | gpt2-small (124M) | pretrained | last | last_block | longest train ex. (120) | 96.63% | 99.33% | 95.00% "
        "| 0.28 min | A100 | - | 96.63% / 99.33% / 95.00%, 0.28 min (A100) |"
    )


def test_row_is_a_markdown_table_whatever_is_in_it():
    odd = replace(RESULT, row=None, published=None, weights="a|b.safetensors")
    header, rule = markdown_header(odd).splitlines()
    row = markdown_row(odd)
    assert row.startswith("| - |") and row.endswith("| - |") and "a\\|b.safetensors" in row
    assert header.count("|") == rule.count("|") == row.replace("\\|", "").count("|")

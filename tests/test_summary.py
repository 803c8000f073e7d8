"""Which records are runs of one configuration, which configurations are rows of one table, and what they answer."""

from helpers import made_up_confusion, made_up_record

from runner.results.summary import find_rows, summarize
from runner.rows import ROWS

MEDIUM = dict(model_size="gpt2-medium (355M)")
NANO = dict(model_size="gpt2-nano (7M)", weights="random", dataset="sample", learning_rate=5e-4)


def row(number, wrong=(), **changes):
    return made_up_record(wrong, **ROWS[number].options | changes)


def nano(number, wrong=(), **changes):
    """A Record of a row's options at the nano size, on the sample, from random weights."""
    return row(number, wrong, **NANO | dict(data="sample", data_sha256="sample") | changes)


def baseline():
    none = dict(seed=None, row=None, tokens_per_message=None, settings={})
    return made_up_record(range(7), is_baseline=True, configuration="linear SVM", **none)


def tables_of(*records):
    return summarize(records).tables


def test_runs_are_rows_of_tables_or_others():
    records = [row(16), row(1, seed=1), row(12), row(1, seed=2), row(5, precision="bf16"), nano(1), nano(2), baseline()]
    published, sample, others = tables_of(*records)
    assert published.title == "The table" and list(published.rows) == [1, 12, 16]
    assert [len(group.records) for group in published.groups] == [2, 1, 1, 1]
    assert published.groups[-1].name == "linear SVM"  # of the same data
    assert published.note == "Not run: rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 17, 18, 19."
    assert sample.title == "Rows with gpt2-nano, random weights, sample data, lr 0.0005"
    assert [group.rows for group in sample.groups] == [(1, 6, 7, 8), (2,)]
    assert (others.title, others.note, [group.name for group in others.groups]) == ("Other runs", "", ["row 5, bf16"])
    [all_nano] = tables_of(*(nano(number) for number in ROWS if number not in (6, 7, 8, 9, 10)))
    assert all_nano.note == "" and len(all_nano.groups) == 14  # some differ in nothing but what all have


PLACES = [
    (dict(num_epochs=2), (1,), dict(num_epochs=2)),
    (dict(num_epochs=2, trainable_token_pos="flexible"), (16,), dict(num_epochs=2)),
    (MEDIUM | dict(num_epochs=2), (6,), dict(num_epochs=2)),
    (dict(num_epochs=2, weights="random", trainable_layers="all"), (10,), dict(num_epochs=2)),
    (dict(context_length=64, trainable_token_pos="flexible"), (16,), dict(context_length=64)),
    (MEDIUM | dict(trainable_layers="all"), (5, 9, 10), MEDIUM),
    (dict(weights="w 1234"), (1, 6, 7, 8), dict(weights="w 1234")),
    (dict(data="own", trainable_layers="lora"), (1,), dict(data="own", trainable_layers="lora")),
]


def test_what_a_run_has_beyond_its_row_is_a_table():
    for options, rows, rest in [*PLACES, *((row.options, (number,), {}) for number, row in ROWS.items())]:
        found, _, of_table = find_rows(options)
        assert (found, of_table) == (rows, rest)


def test_one_row_is_no_table_and_two_are_one_for_each_data_and_precision():
    """Else a sweep of learning rates would be a table for each."""
    [others] = tables_of(*(row(16, learning_rate=n / 1000) for n in range(1, 9)), row(1, lora_rank=4))
    assert [group.name for group in others.groups[-2:]] == ["flexible token, lr 0.008", "rank 4"]
    own = [dict(options=ROWS[n].options | dict(data=f"own data {d}"), data_sha256=d) for n in (1, 2) for d in "ab"]
    tables = tables_of(*(made_up_record(**one) for one in own), row(1, precision="bf16"), row(2, precision="bf16"))
    assert [table.title for table in tables] == ["Rows with bf16", "Rows with own data a", "Rows with own data b"]
    assert [len(table.answers) for table in tables] == [1, 1, 1]


def test_a_lopsided_data_set_is_told_beside_its_accuracies():
    lopsided = dict.fromkeys(("train", "validation", "test"), made_up_confusion({}, totals=(270, 30)))
    [table] = tables_of(row(1, confusions=lopsided), row(2, confusions=lopsided))
    assert table.note.startswith("Always the most frequent class: 90.00%. Not run: rows 3, ")


def test_a_seed_counts_once_and_remarks_tell_which_and_the_notes():
    runs = [row(1, [1], device_name="A100"), row(1, [1, 2], device_name="CPU"), row(1, [1], seed=7, note="n", run="x")]
    summary = summarize(runs)
    assert summary.records == [runs[0], runs[2]]
    torch = runs[0].versions["torch"]
    results = f"99.67% on A100, PyTorch {torch}; 99.33% on CPU, PyTorch {torch}"
    assert summary.remarks == [
        f"row 1, seed 123: mistakes differ, the first run counts: test {results}.",
        "Note of x: n",
    ]


def test_what_a_line_says():
    runs = [row(1, range(n), seed=n, minutes=n / 10, feature_seconds=n) for n in (10, 20, 30)]
    [table] = tables_of(*runs, row(3))
    titles = "Row, Configuration, n, Test, Unseen, Published, Validation, Training, Minutes, Features"
    assert ", ".join(table.cells) == titles
    cells = ["93.33 [84.4–100.0]", "93.96", "95.00 inside", "100.00", "100.00", "2.00", "20 s"]  # all seeds are inside
    assert table.cells.values[0].tolist() == ["1", "last block, last token", "3", *cells]
    assert table.cells["Published"][1] == "72.00 outside"
    rare = made_up_confusion({number: 0.9 for number in range(1, 12, 2)}, totals=(294, 6))
    [table] = tables_of(row(1, confusions=dict.fromkeys(("train", "validation", "test"), rare)))
    assert list(table.cells["Macro F1"]) == ["0.495"]  # where accuracy says little


def answers_of(*records):
    return [found for table in tables_of(*records) for found in table.answers.values()]


def test_questions_of_all_tables_are_corrected_together():
    [alone] = answers_of(nano(1, range(30)), nano(2, range(40)))
    one, other = answers_of(row(1, range(30)), row(2, range(40)), nano(1, range(30)), nano(2, range(40)))
    assert one.p == other.p == 2 * alone.p


def test_a_verdict_in_words():
    worse, identical = answers_of(row(1, range(10, 30)), row(2, range(60)), row(18, range(10, 30)))
    assert worse.sentence == (
        "worse, -13.33 points (95% interval -17.1 to -9.4), p < 0.001; one run each, 40 messages right only in the "
        "first, 0 only in the second."
    )
    assert identical.sentence.startswith("identical predictions; one run each")


def test_messages_without_a_label_do_not_count():
    """The numbers of the others go further than their count."""
    [found] = answers_of(row(1, [0, 301]), row(2, [301, 302, 303]))
    assert found.basis.endswith("2 messages right only in the first, 1 only in the second")
    assert found.difference == -1 / 300

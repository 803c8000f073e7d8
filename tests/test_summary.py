"""Which records are runs of one configuration, which configurations are rows of one table, and what they answer."""

from dataclasses import replace

import pytest
from helpers import made_up_confusion, made_up_record

from runner.data.datasets import Duplicates
from runner.results.summary import places, summarize
from runner.rows import ROWS

MEDIUM = dict(model_size="gpt2-medium (355M)")
XL = dict(model_size="gpt2-xl (1558M)")
NANO = dict(model_size="gpt2-nano (7M)", weights="random", dataset="sample", learning_rate=5e-4)
RANDOM_ALL = dict(weights="random", trainable_layers="all")
SPLITS = ("train", "validation", "test")


def row(number, wrong=(), **changes):
    return made_up_record(wrong, **ROWS[number].options | changes)


def nano(number, wrong=(), **changes):
    """A Record of a row's options at the nano size, on the sample, from random weights."""
    return row(number, wrong, **NANO | dict(data="sample", data_sha256="sample") | changes)


def baseline(wrong=range(7), validation=(), **changes):
    none = dict(seed=None, row=None, tokens_per_message=None, settings={}, options={})
    record = made_up_record(wrong, is_baseline=True, **dict(configuration="linear SVM") | none | changes)
    return with_validation(record, validation)


def with_validation(record, wrong):
    """The Record with mistakes on these of 300 validation messages."""
    confusion = made_up_confusion(dict.fromkeys(wrong, 0.9))
    return replace(record, confusions=record.confusions | dict(validation=confusion))


def tables_of(*records):
    return summarize(records).tables


def answers_of(*records):
    """{rows: Answer} of all tables."""
    return {answer.rows: answer for table in tables_of(*records) for answer in table.answers}


# --- which runs belong together ---


def test_runs_are_rows_of_tables_or_others():
    records = [row(16), row(1, seed=1), row(12), row(1, seed=2), row(5, precision="bf16"), nano(1), nano(2), baseline()]
    published, sample, others = tables_of(*records)
    assert published.title == "The table" and list(published.rows) == [1, 12, 16]
    assert [len(group.records) for group in published.groups] == [2, 1, 1, 1]
    assert published.groups[-1].name == "linear SVM"  # of the same data
    assert published.note == "Not run: rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 17, 18, 19."
    assert sample.title == "Rows with gpt2-nano, random weights, sample data, lr 0.0005"
    assert [group.row for group in sample.groups] == [1, 2]
    assert (others.title, others.note, [group.name for group in others.groups]) == ("Other runs", "", ["row 5, bf16"])
    note = summarize(records).note
    assert "Published: " in note and "Unseen: " in note and "Undecided: " in note
    note = summarize([nano(1), nano(3, weights="file 12ab")]).note
    assert note.startswith("Test: ") and "Published: " not in note and "Undecided: " not in note
    [all_nano] = tables_of(*(nano(number) for number in ROWS if number not in (6, 7, 8, 9, 10)))
    assert all_nano.note == "" and len(all_nano.groups) == 14  # some differ in nothing but what all have


PLACES = [
    (dict(num_epochs=2), {1: dict(num_epochs=2)}),
    (MEDIUM, {6: {}, 1: MEDIUM}),
    (MEDIUM | dict(num_epochs=2), {6: dict(num_epochs=2), 1: MEDIUM | dict(num_epochs=2)}),
    (XL | dict(trainable_layers="all"), {9: {}, 8: dict(trainable_layers="all"), 5: XL}),
    (dict(trainable_layers="lora", lora_rank=16), {1: dict(trainable_layers="lora", lora_rank=16)}),  # not row 12
    (XL | dict(trainable_layers="lora", lora_rank=16), {12: {}}),
    (dict(weights="file 12ab"), {1: dict(weights="file 12ab")}),
]


@pytest.mark.parametrize("options, expected", PLACES)
def test_a_run_is_a_row_of_every_table_that_it_fits(options, expected):
    found = places(options)
    for number, table in expected.items():
        assert (number, table) in found
    published = [[number for number, table in pairs if table == {}] for pairs in (found, expected.items())]
    assert published[0] == published[1]


def test_each_row_is_its_own_in_the_published_table():
    for number, one in ROWS.items():
        assert [row for row, table in places(one.options) if not table] == [number]


def test_a_run_at_another_size_is_row_1_of_its_table_and_row_6_of_the_published_one():
    published, medium = tables_of(*(row(n, range(n), **MEDIUM) for n in (1, 2, 16)))
    assert list(published.rows) == [6] and medium.title == "Rows with gpt2-medium"
    assert list(medium.rows) == [1, 2, 16] and medium.note.startswith("Not run: rows 3, 4, 5, 10, 11, 12, 13, ")
    assert [answer.rows for answer in medium.answers] == ["1–2", "1–16"]


def test_a_table_that_repeats_rows_of_another_is_left_out_and_none_is_compared_twice():
    """Rows 8 and 9 are rows 1 and 5 of the largest model, and with row 2 there is something to add."""
    assert len(tables_of(*(row(n) for n in (1, 5, 8, 9)))) == 1
    published, largest = tables_of(*(row(n) for n in (1, 8, 9, 12)), row(2, **XL))
    assert list(largest.rows) == [1, 2, 5, 12]
    assert [answer.rows for answer in published.answers] == ["1–8", "9–12"]
    assert [answer.rows for answer in largest.answers] == ["1–2", "1–5"]


def test_one_row_is_no_table_and_two_are_one_for_each_data_and_precision():
    """Else a sweep of learning rates would be a table for each."""
    [others] = tables_of(*(row(16, learning_rate=n / 1000) for n in range(1, 9)), row(1, lora_rank=4))
    assert [group.name for group in others.groups[-2:]] == ["flexible token, lr 0.008", "rank 4"]
    own = [dict(options=ROWS[n].options | dict(data=f"own data {d}"), data_sha256=d) for n in (1, 2) for d in "ab"]
    tables = tables_of(*(made_up_record(**one) for one in own), row(1, precision="bf16"), row(2, precision="bf16"))
    assert [table.title for table in tables] == ["Rows with bf16", "Rows with own data a", "Rows with own data b"]
    assert [len(table.answers) for table in tables] == [1, 1, 1]


def test_what_reads_the_same_is_told_apart_by_its_options():
    """Two weights files are two tables, also where 8 digits of their SHA-256 are the same."""
    good = dict(weights="file 01234567", weights_sha256="01234567a")
    bad = dict(weights="file 89abcdef", weights_sha256="89abcdef")
    runs = [row(1, range(9), **good), row(2, range(99), **good), row(1, range(90), **bad), row(2, **bad)]
    first, second = tables_of(*runs)
    assert first.title == "Rows with file 01234567 weights" and "89abcdef" in second.title
    assert [group.percent() for group in first.groups] == pytest.approx([97, 67])
    same = good | dict(weights_sha256="01234567b")
    assert len(tables_of(row(1, **good), row(2, **good), row(1, **same), row(2, **same))) == 2
    other = made_up_record(confusions=dict.fromkeys(SPLITS, made_up_confusion({}, totals=(9, 9))))
    assert [len(table.groups) for table in tables_of(row(1), row(1, data_sha256="other"), other)] == [1, 1, 1]
    rates = [row(n, learning_rate=rate) for n in (1, 2) for rate in (5e-4, 5.000001e-4)]
    assert [table.title for table in tables_of(*rates)] == ["Rows with lr 0.0005", "Rows with lr 0.0005000001"]


def test_a_seed_counts_once_and_remarks_tell_which_and_the_notes():
    runs = [
        row(1, [1], device_name="A100"),
        row(1, [1, 2], device_name="CPU"),
        row(1, [1], seed=7, note="n", run_id="x"),
    ]
    summary = summarize(runs)
    assert summary.records == [runs[0], runs[2]]
    torch = runs[0].versions["torch"]
    results = f"99.67% on A100, PyTorch {torch}; 99.33% on CPU, PyTorch {torch}"
    assert summary.remarks == [
        f"row 1, seed 123: mistakes differ, the first run counts: test {results}.",
        "Note of x: n",
    ]
    twice = [row(1, note="n", **MEDIUM), row(2, **MEDIUM)]  # row 6 of one table, row 1 of another
    assert summarize(twice).records == twice and len(summarize(twice).remarks) == 1


# --- what a table says ---


def test_what_a_line_says():
    runs = [row(1, range(n), seed=n, minutes=n / 10, feature_seconds=n) for n in (10, 20, 30)]
    [table] = tables_of(*runs, row(3))
    titles = "Row, Configuration, n, Test, Unseen, Published, Validation, Training, Minutes, Features"
    assert ", ".join(table.cells) == titles
    cells = ["93.33 [84.4–100.0]", "93.96", "95.00 inside", "100.00", "100.00", "2.00", "20 s"]  # all seeds are inside
    assert table.cells.values[0].tolist() == ["1", "last block, last token", "3", *cells]
    assert table.cells["Published"][1] == "72.00 outside"
    repeated = dict(validation=Duplicates(), test=Duplicates((), tuple(range(300))))
    [table] = tables_of(row(1, duplicates=repeated))
    assert table.cells["Unseen"][0] == "n/a"  # all are repeated
    rare = made_up_confusion({index: 0.9 for index in range(1, 12, 2)}, totals=(294, 6))
    [table] = tables_of(row(1, confusions=dict.fromkeys(SPLITS, rare)))
    assert list(table.cells["Macro F1"]) == ["0.495"]  # where accuracy says little


def test_intervals_are_made_from_the_variances_of_the_table():
    """Five rows without variation make the interval of the first narrower; other runs are no table."""
    runs = [row(1, range(n), seed=n) for n in (10, 20, 30)]
    alone = tables_of(*runs)[0].groups[0]
    assert alone.mean_variance == pytest.approx(((1 / 30) ** 2 / 3, 2))
    others = [row(n, range(9), seed=seed) for n in (2, 3, 4, 5) for seed in (1, 2, 3)]
    group = tables_of(*runs, *others)[0].groups[0]
    assert group.mean_variance == pytest.approx(((1 / 30) ** 2 * (1 / 5 + 2) / 3 / 3, 3))
    assert alone.interval[0] < group.interval[0] < 91
    sweep = [row(1, range(n * seed), seed=seed, lora_rank=n) for n in range(1, 7) for seed in (1, 2)]
    assert {one.mean_variance.freedom for one in tables_of(*sweep)[0].groups} == {1}


def test_a_lopsided_data_set_is_told_beside_its_accuracies():
    lopsided = dict.fromkeys(SPLITS, made_up_confusion({}, totals=(270, 30)))
    [table] = tables_of(row(1, confusions=lopsided), row(2, confusions=lopsided))
    assert table.note.startswith("Always the most frequent class: 90.00%. Not run: rows 3, ")


# --- what is answered ---


def test_questions_of_all_tables_are_corrected_together_but_for_the_same_predictions():
    alone = answers_of(nano(1, range(30)), nano(2, range(40)))["1–2"].found
    tables = tables_of(row(1, range(30)), row(2, range(40)), row(18, range(30)), nano(1, range(30)), nano(2, range(40)))
    one, same, other = (answer.found for table in tables for answer in table.answers)
    assert one.p == other.p == 2 * alone.p and same.is_same


def test_what_the_seeds_show_is_told_at_the_level_of_all_questions():
    """Of two questions half of 0.05; that rows 1 and 18 are the same says nothing of it."""
    wrong = {1: (3, 9, 15), 2: (30, 40, 60), 3: (5, 6, 7), 18: (3, 9, 15)}
    [table] = tables_of(*(row(n, range(k), seed=seed) for n in wrong for seed, k in enumerate(wrong[n])))
    two, three, same = (answer.found for answer in table.answers)
    half = 100 * (two.variances.half_width(0.025) + three.variances.half_width(0.025)) / 2
    assert same.is_same and table.remarks[0].startswith(f"These seeds can show a difference of about {half:.1f} points")


def test_a_reason_is_given_for_a_difference_that_was_found_only():
    worse, undecided, same = answers_of(
        row(1, range(30)), row(2, range(60)), row(17, range(32)), row(18, range(30))
    ).values()
    assert worse.sentence.startswith("Row 2 is 10.00 points worse (95% interval ")
    assert " only in row 2. What differs: Under the causal mask the first token sees only itself" in worse.sentence
    assert undecided.sentence.endswith(" only in row 17.")
    assert same.sentence == "Row 18 has the same predictions (one run each)."
    two = [row(n, range(99 * n), seed=seed) for n in (1, 2) for seed in (1, 2)]
    assert answers_of(*two)["1–2"].sentence.endswith(", or one run each.")


def test_a_reason_is_of_the_data_and_the_weights_of_the_rows():
    """Facts of the collection are told of the collection only, those of pretrained weights not of random ones."""
    for data, is_told in (("uci", True), ("sample", False)):
        assert ("1,045" in answers_of(row(1, data=data), row(7, data=data))["1–7"].why) == is_told
    assert answers_of(nano(1), nano(17, [1]))["1–17"].why == ""
    assert "pretrained" in answers_of(row(1), row(17, [1]))["1–17"].why


def test_the_best_row_is_that_of_the_highest_validation_accuracy():
    """Of equals the first; the test messages have no say, and a baseline is no row."""
    runs = [row(4, range(9)), row(2), row(16, range(3)), baseline()]
    runs = [with_validation(run, range(n)) for run, n in zip(runs, (2, 5, 2, 0))]
    [table] = tables_of(*runs)
    begin = "Which is best? Row 4 (last two blocks) has the highest validation accuracy, 99.33%, as high as row 16; "
    assert table.best.row == 4 and table.remarks[1].startswith(begin)
    [alone] = tables_of(runs[0])
    assert alone.remarks == []
    seeds = [with_validation(row(4, seed=seed), range(n)) for seed, n in ((1, 3), (2, 0), (3, 5))]
    assert tables_of(*seeds, with_validation(row(5), range(3)))[0].best.row == 4  # by the mean of its seeds


def test_the_best_row_is_compared_with_the_better_baseline():
    """As one more question: three seeds are enough for a verdict, and its p-value is corrected with the others."""
    wrong = {1: range(5), 2: range(9)}
    seeds = [with_validation(row(n, wrong[n], seed=seed), range(n)) for n in (1, 2) for seed in (1, 2, 3)]
    baselines = [
        baseline(range(60), range(4)),
        baseline(range(40), range(3), configuration="better", run_id="b"),
        baseline([], [], data_sha256="others"),
    ]
    tables = tables_of(*seeds, *baselines)
    first, answer = tables[0].answers
    assert answer.rows == "1" and answer.asks.endswith("beat a linear model (better)?")
    assert answer.found.verdict == "better" and answer.found.difference == pytest.approx(35 / 300)
    assert answer.found.n_seeds == 3
    assert tables[1].title == "Other runs" and len(tables[1].groups) == 1


def test_a_baseline_stands_in_every_table_of_its_data():
    published, medium = tables_of(*(row(n, range(n), **MEDIUM) for n in (1, 2)), baseline())
    assert published.groups[-1].name == medium.groups[-1].name == "linear SVM"
    assert [answer.rows for answer in published.answers] == ["6"]  # the same two are compared once
    assert [answer.rows for answer in medium.answers] == ["1–2"]


def test_messages_without_a_label_do_not_count():
    """The indices of the others go further than their count."""
    found = answers_of(row(1, [0, 301]), row(2, [301, 302, 303]))["1–2"].found
    assert found.basis.endswith("2 messages right only in row 1, 1 only in row 2")
    assert found.difference == -1 / 300

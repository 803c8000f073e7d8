"""Own data as people have it: labels, columns, file names, what is worth a warning, and predictions as CSV."""

import io
import random
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from helpers import records_in

import additional_experiments as ae
import gpt_download
from additional_experiments import main
from runner.data import datasets
from runner.files import UserError


def write(path, rows, header="Label,Text", **keywords):
    """Write a file of comma-separated lines."""
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("\n".join([header, *rows]) + "\n", newline="", **keywords)


def read(data_dir, ignore_index=-100, **columns):
    return datasets.load(ae.Experiment(data_dir=data_dir, ignore_index=ignore_index, **columns))


def write_splits(folder, **rows):
    """Write the three files, by default with a few messages of classes a and b."""
    for split in datasets.SPLITS:
        write(Path(folder, f"{split}.csv"), rows.get(split, [f"a,{split} 1", f"b,{split} 2"]))


# --- labels ---


@pytest.mark.parametrize(
    "labels, ignore_index, names",
    [
        ("5 1 3 2 4 10", -100, ["1", "2", "3", "4", "5", "10"]),
        ("1 -1", -100, ["-1", "1"]),
        ("1.0 0.5 0", -100, ["0", "0.5", "1"]),
        ("A10 007 7", -100, ["007", "7", "A10"]),  # codes: one is no number
        ("1_0 100 nan", -100, ["100", "1_0", "nan"]),
        ("9007199254740993 9007199254740992", -100, ["9007199254740992", "9007199254740993"]),
        ("b a 良い", -100, ["a", "b", "良い"]),
        ("-1 2 1", -1, ["1", "2"]),
        ("b -1 a", -1, ["a", "b"]),
        ("2 1 0", 2, ["0", "1", "2"]),  # the loss ignores it
    ],
)
def test_any_set_of_labels(labels, ignore_index, names):
    """The classes are those of training, in the order of numbers or of the alphabet, but for "no label"."""
    write_splits("own", **dict.fromkeys(datasets.SPLITS, [f"{label},{label} text" for label in labels.split()]))
    data = read("own", ignore_index)
    assert data.class_names == names
    for frame in data.splits.values():
        expected = [str(label).split()[0].removesuffix(".0") for label in frame["Text"]]
        found = [data.class_names[code] if code >= 0 else str(code) for code in frame["Label"]]
        assert found == expected and frame["Label"].dtype == "int64"
    assert all("are among the training messages" in warning for warning in data.warnings)


@pytest.mark.parametrize("labels, ignore_index", [("1 2 3", 2), ("a b", 1)])
def test_a_class_that_the_loss_would_confuse_with_another(labels, ignore_index):
    """It knows classes by their numbers from 0 on."""
    write_splits("own", train=[f"{label},text {label}" for label in labels.split()])
    with pytest.raises(UserError, match=f"^--ignore_index {ignore_index}: the labels are not 0, 1, 2 and so on"):
        read("own", ignore_index)


def test_labels_that_differ_in_case_only_get_one_warning():
    write_splits("own", train=["Spam,a", "spam,b", "SPAM,c", "ham,d", "Ham,e"], validation=["ham,f"], test=["ham,g"])
    assert read("own").warnings == ["classes whose names differ in case only: Ham and ham, SPAM and Spam and spam"]


# --- columns ---


@pytest.mark.parametrize(
    "header, options",
    [
        ("v1,v2,,,", "--text_column v2 --label_column v1"),
        ("one,v2,v1", "--text_column v2 --label_column v1"),  # the first has the same value everywhere
        ("id;sms text;kind", '--text_column "sms text" --label_column kind'),
        ("Text;no;kind", "--text_column Text --label_column kind"),
        ("Label,Text,text", None),
    ],
)
def test_a_header_is_answered_with_the_options_that_read_it(header, options):
    """They work as they are: what is suggested for a file reads it."""
    separator = ";" if ";" in header else ","
    values = dict(
        one="11", v1="ab", v2=["long words {}"] * 2, id=["{}"] * 2, kind="xy", no=["{}"] * 2, Label="ab", Text="st"
    )
    values |= {"": ["", ""], "sms text": ["a, message {}"] * 2, "Text": ["a text {}"] * 2, "class": "pq", "text": "st"}
    rows = [separator.join(values[name][n % 2].format(n) for name in header.split(separator)) for n in range(40)]
    write("own.csv", rows, header)
    with pytest.raises(UserError) as error:
        read("own.csv")
    begin, _, suggested = str(error.value).partition("; to use its own columns add ")
    suggested = suggested.removesuffix("; if it is a message, put the names of the columns above it")
    assert begin == f"own.csv, line 1: the header must have one column Label and one column Text; it is {header!r}"
    assert suggested == (options or "")
    if options:
        _, name, _, label = shlex.split(suggested)
        data = read("own.csv", text_column=name.upper(), label_column=label)
        assert len(data.splits["train"]) == 28 and len(data.class_names) == 2


@pytest.mark.parametrize(
    "header, row, options, guessed",
    [
        ("Tweet,n,Class", "{1} {0},{0},{1}", {}, dict(Tweet="Text", Class="Label")),
        ("foo,Label", "{1} {0},{1}", {}, dict(foo="Text")),
        ("n,Review,foo", "{0},{1} {0},{1}", dict(label_column="foo"), dict(Review="Text")),
        ("text,foo", "{1} {0},{1}", dict(text_column="TEXT"), dict(foo="Label")),
    ],
)
def test_columns_that_can_be_told_need_no_options(header, row, options, guessed):
    """Usual names, and the other one of two columns; which they are is a warning."""
    write("own.csv", [row.format(n, "ab"[n % 2]) for n in range(20)], header)
    data = read("own.csv", **options)
    assert data.warnings == [f"own.csv: column {name!r} is read as {wanted}" for name, wanted in guessed.items()]
    assert data.notes[-1] == "2 classes: a, b"
    assert [text[0] for text in data.test_texts] == [data.class_names[k] for k in data.splits["test"]["Label"]]


@pytest.mark.parametrize(
    "header, options",
    [("Tweet,Review,Class", {}), ("foo,bar", {}), ("foo,Label", dict(text_column="no")), ("Text,Text", {})],
)
def test_columns_that_cannot_be_told(header, options):
    write("own.csv", ["a,b,c"[: 2 * header.count(",") + 1]] * 2, header)
    with pytest.raises(UserError, match="^own.csv, line 1: the header must have one column "):
        read("own.csv", **options)


@pytest.mark.parametrize(
    "lines, advice",
    [
        (
            ["ham,see you", "spam,win", "ham,ok"],
            "; if it is a message, put the names of the columns above it",
        ),
        (["My data;;", "Label;Text;n", "ham;ok;1"], "; the next line has them: delete what is above"),
    ],
)
def test_a_file_whose_first_line_is_no_header(lines, advice):
    write("own.csv", lines[1:], lines[0])
    with pytest.raises(UserError) as error:
        read("own.csv")
    assert str(error.value).endswith(advice)


def test_other_column_names_do_not_make_another_run(quick, data_dir, capsys):
    assert main(quick) == 0
    for split in datasets.SPLITS:
        frame = pd.read_csv(data_dir / f"{split}.csv")
        frame.rename(columns=dict(Label="Class", Text="Words")).to_csv(data_dir / f"{split}.csv", index=None)
    capsys.readouterr()
    assert main([*quick, "--text-column", "words", "--label-column", "class", "--skip_finished"]) == 0
    assert "Finished before: " in capsys.readouterr().out and len(records_in()) == 1
    assert main(["--baseline", "--data_dir", str(data_dir), "--label_column", "kind"]) == 2
    assert "add --text_column Words --label_column Class" in capsys.readouterr().err


# --- files ---


def test_one_file_is_split_whatever_its_order(quick, capsys):
    counts = dict(a=67, b=30, c=1, d=2)
    rows = [f"{label},message {n} of {label}" for label in counts for n in range(counts[label])]
    splits = []
    for name in ("sorted.csv", "shuffled.csv"):
        write(name, rows)
        data = read(name)
        splits.append({split: frame[["Label", "Text"]].values.tolist() for split, frame in data.splits.items()})
        random.Random(0).shuffle(rows)
    assert splits[0] == splits[1]
    assert sorted(text for of_split in splits[0].values() for _, text in of_split) == sorted(r[2:] for r in rows)
    assert [len(splits[0][split]) for split in datasets.SPLITS] == pytest.approx([70, 10, 20], abs=3)
    train = [label for label, _ in splits[0]["train"]]
    assert {0, 1, 2, 3} == set(train) and train.count(0) == pytest.approx(47, abs=2) and train != sorted(train)

    quick[quick.index("--data_dir") + 1] = "sorted.csv"
    assert main(quick) == 0
    assert "\nsorted.csv is split at random, always in the same way: 70% training" in capsys.readouterr().out
    [record] = records_in()  # which data it was is told in words, but the same file elsewhere makes the same run
    assert record["configuration"].endswith(" (sorted.csv)") and "sorted" not in record["run_id"]
    assert main([*quick, "--predictions", "sorted.csv"]) == 2
    assert "--predictions sorted.csv would overwrite the data" in capsys.readouterr().err
    write("few.csv", ["a,1", "b,2"])
    with pytest.raises(
        UserError, match="--data_dir few.csv: 2 messages with 2 different labels are too few to be split"
    ):
        read("few.csv")


def test_the_collection_itself_may_be_the_file(monkeypatch):
    """It is read with the quotes of CSV, unlike other files with tabs: the published numbers contain that."""
    monkeypatch.setattr(gpt_download, "COLLECTION_SHA256", gpt_download.SAMPLE_SHA256)
    data = read(gpt_download.SAMPLE)
    assert data.name == "uci" and data.notes == [] and len(data.splits["train"]) == 840


@pytest.mark.parametrize("name", ["val.csv", "dev.tsv", "valid.csv"])
def test_other_names_of_the_files(name):
    write_splits("own")
    Path("own/validation.csv").unlink()
    with pytest.raises(UserError, match=r"holds train.csv and test.csv, but no validation.csv \(or .tsv\); a single"):
        read("own")
    separator = "\t" if name.endswith("tsv") else ","
    write(f"own/{name}", [f"a{separator}x", f"b{separator}y"], f"Label{separator}Text")
    data = read("own")
    assert data.name == "own" and data.splits["validation"]["Text"].tolist() == ["x", "y"]
    write("own/validation.csv", ["a,x"])
    write("own/test.tsv", ["a,x"])
    with pytest.raises(UserError, match=f"holds validation.csv and {name}, test.csv and test.tsv: move all but one"):
        read("own")


def test_tabs_and_quotes():
    """A quote is text between tabs, and in Excel's files with tabs it is not."""
    lines = ['ham\t"Hi" he said', 'spam\t"never closed', 'ham\tsay ""x""', 'spam\t"all"', 'ham\t"say ""x"" twice"']
    write_splits("own")
    write("own/test.tsv", lines, "Label\tText")
    write_splits("own", train=["ham,a", "spam,b"], validation=["ham,c", "spam,d"])
    Path("own/test.csv").unlink()
    assert read("own").splits["test"]["Text"].tolist() == [line.split("\t")[1] for line in lines]
    write("own/test.tsv", lines[-2:], "Label\tText")  # the first could do without its quotes
    assert read("own").splits["test"]["Text"].tolist() == [line.split("\t")[1] for line in lines[-2:]]
    write("own/test.tsv", ['ham\t"two\nlines"', 'spam\t"a ""b"""'], "Label\tText", encoding="utf-16")
    assert read("own").splits["test"]["Text"].tolist() == ["two\nlines", 'a "b"']


def test_tabs_and_the_quotes_of_pandas():
    """They are those of CSV, if all of them are."""
    texts = ["a\tb", 'say "hi"', "plain", "it's 5\""]
    frame = pd.DataFrame(dict(Label=["a", "b"] * 10, Text=[f"{text} {n}" for n in range(5) for text in texts]))
    frame.to_csv("own.tsv", sep="\t", index=None)
    data = read("own.tsv")
    assert data.warnings == ["own.tsv: quotes are read as those of CSV, not as part of the texts"]
    assert sorted(text for split in data.splits.values() for text in split["Text"]) == sorted(frame["Text"])
    with open("own.tsv", "a") as file:
        file.write('a\t"never closed\n')
    with pytest.raises(
        UserError, match="own.tsv, line 2: 3 instead of 2 fields; a text cannot contain a tab or a line break"
    ):
        read("own.tsv")


# --- what is worth a warning ---


def test_a_file_with_tabs_in_which_all_fields_are_quoted():
    """As R's write.table writes it, and pandas if it is told to."""
    frame = pd.DataFrame(dict(Label=["a", "b"] * 10, Text=[f"text {n}" for n in range(20)]))
    frame.to_csv("own.tsv", sep="\t", index=None, quoting=1)
    data = read("own.tsv")
    assert data.class_names == ["a", "b"] and set(data.test_texts) < set(frame["Text"])


def test_separators_at_the_end_of_rows_and_blank_lines():
    write_splits("own", train=["a,x,", "b,y,,", "  ", ",,"])
    data = read("own")
    assert data.splits["train"]["Text"].tolist() == ["x", "y"] and data.warnings == [
        "own/train.csv: rows without a text are left out: 1 (line 5)"
    ]


def test_the_same_warning_of_three_files_is_one():
    for split in datasets.SPLITS:
        write(Path("own", f"{split}.csv"), [f"a,{split} 1", f"b,{split} 2"], "Class,Text")
    assert read("own").warnings == ["own/train.csv, own/validation.csv, own/test.csv: column 'Class' is read as Label"]


def test_rows_without_a_text_are_left_out():
    write_splits("own", train=["a,x", "b,", "a, ", "b,y"])
    data = read("own")
    assert data.warnings == ["own/train.csv: rows without a text are left out: 2 (lines 3, 4)"]
    assert data.splits["train"]["Text"].tolist() == ["x", "y"]


def test_a_text_that_has_swallowed_rows():
    write_splits("own", train=['b,"never closed', "a,next", 'b,last"', 'a,"two', 'lines, three"', 'b,"x', 'a,y"'])
    [warning] = read("own").warnings
    problem = (
        "texts of several lines that hold what looks like a row of the file: 2 (lines 2, 7); is a quote not closed?"
    )
    assert warning == f"own/train.csv: {problem}"


def test_half_of_the_test_messages_among_the_training_messages():
    write_splits("own", train=["a,x", "b,y"], test=["a,x", "b,y", "a,v", "b,w"], validation=["a,x", "a,z", "b,u"])
    [warning] = read("own").warnings
    assert warning.startswith("2 of 4 test messages are among the training messages, word for word: ")


def test_validation_messages_sorted_by_label(quick, data_dir, capsys):
    """Estimates during training are of the first five batches."""
    write(data_dir / "validation.csv", ["-100,c", *["0,a"] * 9, *["1,b"] * 9])
    warning = "warning: the first 10 validation messages are all 0: losses and accuracies during training are of that"
    for batch_size, is_warned in ((2, True), (3, False)):
        assert main([*quick, "--batch_size", str(batch_size)]) == 0
        assert (warning in capsys.readouterr().err) == is_warned


def test_cut_texts_are_counted(quick, data_dir, capsys):
    """And those that are repeated within their split."""
    write(data_dir / "test.csv", ["0," + "word " * 60, "1,b", "1,b", "1,b"])
    options = [*quick, "--context_length", "30", "--save_model", "saved.safetensors"]
    assert main(options) == 0
    out, err = capsys.readouterr()
    test = "1 of 4 test texts has more than 30 tokens and is cut"
    assert f"\nTokens per message: 30 at most, padded; {test}\n" in out and "cut" not in err
    assert re.search("\nRepeated within their split: .*2 of 4 test messages\n", out)
    write(data_dir / "train.csv", [f"{n % 2},{'word ' * (1023 + (n < 3))}" for n in range(8)])
    assert main([*quick, "--trainable_token_pos", "first"]) == 0
    out, err = capsys.readouterr()
    assert "warning: 3 of 8 training texts have more than 1,024 tokens and are cut\n" in err and "are cut" not in out
    assert main(["--load_model", "saved.safetensors", "--classify", "word " * 40, "b"]) == 0
    assert capsys.readouterr().err == "warning: 1 of 2 texts has more than 30 tokens and is cut\n"


def test_a_long_text_to_which_all_others_are_padded(quick, data_dir, capsys):
    texts = [f"one{' two' * (n // 50 + 1)}{' word' * 90 * (n == 7)}" for n in range(200)]
    write(data_dir / "train.csv", [f"{n % 2},{text}" for n, text in enumerate(texts)])
    advice = "--context_length 5 or --trainable_token_pos flexible is faster"
    line = f"99% of the training texts have at most 5 tokens: {advice}"
    for further, is_told in ((), True), (("--trainable_token_pos=flexible",), False), (("--context_length=90",), False):
        assert main([*quick, *further]) == 0
        assert (line in capsys.readouterr().out.splitlines()) == is_told
    assert main([*quick, "--disable_causal_mask", "--trainable_token_pos=flexible"]) == 0  # now pads are seen
    assert line.replace(" or --trainable_token_pos flexible", "") in capsys.readouterr().out.splitlines()


# --- predictions ---

ODD = ["=1+1", 'say "hi", you', "two\nlines", "日本語 é", "a;b\tc"]


def test_predictions_of_each_message(quick, data_dir, capsys):
    rows = [("-100" if n == 2 else n % 2, text) for n, text in enumerate(ODD)]
    pd.DataFrame(rows, columns=["Label", "Text"]).to_csv(data_dir / "test.csv", index=None)
    assert main([*quick, "--predictions", "predictions.csv", "--save_model", "saved.safetensors"]) == 0
    assert "Wrote the predictions to predictions.csv" in capsys.readouterr().out
    assert Path("predictions.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # which tells Excel that it is UTF-8
    table = pd.read_csv("predictions.csv", keep_default_na=False)
    assert [*table] == ["split", "number", "label", "predicted", "probability_0", "probability_1", "text"]
    assert table["split"].tolist() == ["validation"] * 9 + ["test"] * 5
    test = table[9:]
    assert test["text"].tolist() == ODD and test["number"].tolist() == [0, 1, 2, 3, 4]
    assert test["label"].astype(str).tolist() == ["0", "1", "", "1", "0"]
    classifier = ae.load_classifier("saved.safetensors")
    labels, probabilities = classifier.predict(ODD)
    assert test["predicted"].astype(str).tolist() == labels
    assert test.iloc[:, 4:6].to_numpy(dtype="float32") == pytest.approx(probabilities.numpy(), abs=1e-5)
    [record] = records_in()
    wrong = test[(test["label"] != "") & (test["label"].astype(str) != test["predicted"].astype(str))]
    assert wrong["number"].tolist() == [mistake[0] for mistake in record["confusions"]["test"]["mistakes"]]


@pytest.mark.parametrize("options", [["x.txt"], ["missing/x.csv"], ["x.csv", "--repeats", "2"]])
def test_predictions_are_refused_before_training(quick, capsys, options):
    assert main([*quick, "--predictions", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--predictions" in err


def test_classify_a_file(quick, data_dir, capsys):
    """The columns are those of the file of predictions; a blank text has no label; labels are optional."""
    assert main([*quick, "--save_model", "saved.safetensors"]) == 0
    command = ["--load_model", "saved.safetensors", "--classify"]
    texts = [*ODD, "  "]
    frame = pd.DataFrame(dict(Words=texts, Label="x"))
    capsys.readouterr()
    for columns in (["Words"], ["Words", "Label"]):
        frame[columns].to_csv("messages.csv", index=None)
        assert main([*command, "messages.csv", "--text_column", "words"]) == 0
        out, err = capsys.readouterr()
        table = pd.read_csv(io.StringIO(out), keep_default_na=False)
        assert err == "" and [*table] == ["number", "label", "predicted", "probability_0", "probability_1", "text"]
        assert table["text"].tolist() == texts and set(table["label"]) == {"x" if "Label" in columns else ""}
        labels, _ = ae.load_classifier("saved.safetensors").predict(ODD)
        assert table["predicted"].astype(str).tolist() == [*labels, ""] and table["probability_1"].iloc[-1] == ""

    for arguments, message in (
        (
            ["messages.csv", "--text_column", "Word"],
            "Words,Label'; to use its own columns add --text_column Words; if it is",
        ),
        (["messages.csv", "hello"], "--classify messages.csv: a file is classified alone, without other messages\n"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    write("ids.csv", ["7,ok", "9,win", ",", "11,"], "id,text")  # no label is needed, so none is guessed
    assert main([*command, "ids.csv"]) == 0
    out, err = capsys.readouterr()
    assert set(pd.read_csv(io.StringIO(out), keep_default_na=False)["label"]) == {""}
    assert err == ""


def test_what_is_probably_no_message(quick, capsys):
    """Another file, and an empty message, get a line of advice, and the answers of a message."""
    assert main([*quick, "--save_model", "saved.safetensors"]) == 0
    Path("notes.txt").write_text("hello")
    capsys.readouterr()
    assert main(["--load_model", "saved.safetensors", "--classify", "notes.txt", "", "x" * 5000, "a.csv"]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[2][:9] for line in out.splitlines()] == ["notes.txt", "", "x" * 9, "a.csv"]
    of_file, of_empty, of_cut = err.splitlines()
    assert of_file.endswith("its name is classified, not its content; for its lines: --classify - < notes.txt")
    assert of_empty.startswith("warning: a message is empty and gets no label") and "cut" in of_cut
    assert main(["--load_model", "saved.safetensors", "--classify", "a.csv"]) == 2
    assert capsys.readouterr().err == "error: --classify a.csv: there is no such file\n"

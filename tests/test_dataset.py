"""The messages: the user's own CSV files, what is wrong with them, and the splits of the collection."""

import hashlib
import os
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from helpers import encoded

import additional_experiments as ae
import gpt_download
from additional_experiments import main, parse_args
from runner.data import datasets
from runner.files import UserError, sha256_of


def write(data_dir, **contents):
    for split, content in contents.items():
        (data_dir / f"{split}.csv").write_bytes(content if isinstance(content, bytes) else content.encode())


def read(data_dir, ignore_index=-100):
    """Return the Dataset of the files of a folder."""
    return datasets.load(ae.Experiment(data_dir=data_dir, ignore_index=ignore_index))


# --- bad data ---

KNOWN = "is not among those of the training messages: 0, 1"


@pytest.mark.parametrize(
    "split, content, message",
    [
        ("train", "", "line 1: the header must have one column Label and one column Text; it is ''"),
        ("train", "Label,Text\n", "line 2: no messages below the header"),
        ("test", "Label,Text,Text\n0,a,b\n", "one column Label and one column Text; it is 'Label,Text,Text'"),
        ("test", "Label,Text\n0,a\n\n1\n", "line 4: 1 instead of 2 fields"),
        ("train", "Label;Text\n0;a;b\n", "line 2: 3 instead of 2 fields; a text that contains ';' needs quotes"),
        (
            "train",
            'Label,Text\n0,a\n,b\n0,"two\nlines"\n ,c\n',
            "line 3: rows without a label: 2 (lines 3, 6)",
        ),
        ("test", 'Label,Text\n0,"two\nlines"\n1,b\nx,c\n', f"line 5: label x {KNOWN}"),
        ("test", "Label\tText\n0\ta\tb\n", "line 2: 3 instead of 2 fields; a text cannot contain a tab"),
        ("validation", "Label,Text\n0,a\n2,b\n", f"line 3: label 2 {KNOWN}"),
        ("train", "Label,Text\n" + "spam,b\n" * 9, "two classes or more; in training there is spam"),
        ("train", 'Label,Text\n0,a\n0,"b\n' + "1,c\n" * 9, "line 3: a quote that opens here is not closed"),
        ("train", b"Label,Text\r0,a\r\x8e,b\r", "line 3: byte 0x8e is not UTF-8"),
        ("train", "Label,Text\n0,a\n".encode("utf-16-le"), "line 1: the header holds NUL characters; save the file as"),
        ("train", "Label,Text\n0,\n1, \n", "no messages below the header, only rows without a text: 2"),
        ("train", b"Label,Text\n" + b"0,a\n" * 90_000 + b"0,caf\xe9\n", "line 90002: byte 0xe9 is not UTF-8"),
        ("train", "Label,Text\n0,a\n".encode("utf-16")[:-1], "line 2: byte 0x0a is not UTF-16"),
    ],
)
def test_bad_data_is_refused_by_line(data_dir, split, content, message):
    write(data_dir, **{split: content})
    with pytest.raises(UserError) as error:
        read(data_dir)
    assert message in str(error.value) and "\n" not in str(error.value) and error.value.status == 2
    assert f"{data_dir}/{split}.csv, line" in str(error.value) or "two classes" in message


# --- the folder ---


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(gpt_download, "fetch_collection", lambda *_: pytest.fail("the collection was asked for"))


@pytest.mark.parametrize("folder", ["missing", "link", "other files"])
def test_a_folder_from_which_somebody_expects_other_data(no_download, tmp_path, folder):
    """Nobody is to train on the collection because of a mistyped name."""
    path = tmp_path / folder
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other files" / "train.csv.gz").mkdir(parents=True)
    problem = " holds train.csv.gz; rename them" if folder == "other files" else ": there is no such file or folder; "
    with pytest.raises(UserError, match=f"^--data_dir {path}{problem}"):
        read(path)


def test_files_of_ones_own_are_never_replaced(no_download, data_dir):
    """By the collection: where one is missing, or where a link leads nowhere."""
    (data_dir / "train.csv").unlink()
    (data_dir / "test.csv").unlink()
    with pytest.raises(UserError, match="holds validation.csv, but no train.csv and no test.csv .or .tsv."):
        read(data_dir)
    for name in ("train.csv", "test.csv"):
        (data_dir / name).symlink_to(data_dir / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"'{data_dir}/train.csv'"):
        read(data_dir)


# --- good data ---

LINES = 'Label,Text\n0,"a, b"\n1,ä€😀\n0,"say ""hi"""\n1,"two\nlines"\n'


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + LINES.replace("\n1", "\r\n\r\n1").replace("\n0", "\r\n0"),
        LINES.replace("0,", "0;").replace("1,", "1;").replace("Label,Text", '"Label";"Text"'),
        LINES.replace("0,", "0\t").replace("1,", "1\t").replace("l,T", "l\tT").encode("utf-16"),
        LINES.replace("Label,Text", "LABEL , text"),
        LINES.replace("0,", " 0.0,").replace("1,", "1.,"),
        LINES.replace("Label,Text", "Note,Label,Text").replace("\n0,", "\n,0,").replace("\n1,", "\n,1,"),
        LINES.replace("Label,Text", "Label,Text,Note"),  # Excel leaves out commas at the end
    ],
)
def test_what_spreadsheets_write(data_dir, content):
    write(data_dir, train=content)
    frame = read(data_dir).splits["train"]
    assert list(frame["Text"]) == ["a, b", "ä€😀", 'say "hi"', "two\nlines"] and list(frame["Label"]) == [0, 1, 0, 1]


def test_text_is_taken_as_it_is(quick, data_dir):
    """NA is a message, and so is <|endoftext|>."""
    texts = ["NA", "null", "a\0b", "two\r\nlines", "<|endoftext|>", " b "]
    pd.DataFrame({"Label": [0, 1] * 3, "Text": texts}).to_csv(data_dir / "test.csv", index=None)
    assert list(read(data_dir).splits["test"]["Text"]) == texts
    assert 50256 not in encoded(parse_args([*quick, "--no_padding"])[0]).pool.x


def test_labels_may_be_names(quick, data_dir, capsys):
    """They are shown instead of numbers, and tell data from other data."""
    numbered = read(data_dir)
    for split in datasets.SPLITS:
        frame = pd.read_csv(data_dir / f"{split}.csv")
        frame.assign(Label=frame["Label"].map({0: " no  spam", 1: "Spam"})).to_csv(data_dir / f"{split}.csv")
    named = read(data_dir, ignore_index=-1)
    assert named.class_names == ["Spam", "no spam"] and named.warnings == []
    assert all((named.splits[split]["Label"] == 1 - numbered.splits[split]["Label"]).all() for split in named.splits)
    assert named.sha256 != numbered.sha256
    assert main(quick) == 0
    assert "Spam predicted as no spam" in capsys.readouterr().out


def test_three_classes_and_messages_without_a_label(quick, data_dir, capsys):
    write(data_dir, train="Label,Text\n" + "0,a\n1,b\n2,c\n" * 4 + "-100,d\n", validation="Label,Text\n2,c\n")
    write(data_dir, test="Label,Text\n-100,a\n2,other\n")
    assert main([*quick, "--batch_size", "14"]) == 2
    assert capsys.readouterr() == ("", "error: --batch_size 14: there are only 13 training messages\n")
    [record] = ae.run(parse_args([*quick, "--batch_size", "1"])[0])
    assert (record.train.total, record.test.total) == (12, 1)
    mistakes = record.confusions["train"].mistakes  # by number of the message, not in the order of training
    assert mistakes and all(mistake.label == mistake.index % 3 for mistake in mistakes)
    assert "n/a" not in capsys.readouterr().out


def test_warnings_come_before_training(quick, data_dir, capsys):
    """And what is not known is not shown as a number."""
    write(data_dir, validation="Label,Text\n-100,same\n", test='Label,Text\n0,"see\nyou"\n1,"see\nyou"\n0,"see\nyou"\n')
    assert main([*quick, "--plot", "curves.png"]) == 0
    out, err = capsys.readouterr()
    assert ", Val loss n/a\n" in out and "| Validation accuracy: n/a (" in out
    assert "% | n/a " in out and " nan" not in out
    assert main(["--report", "results", "--write", "page.html"]) == 0
    assert capsys.readouterr().err == ""
    unlabelled, contradictory = err.splitlines()
    assert "no validation message has a label: there is no loss" in unlabelled
    assert contradictory.endswith('with contradictory labels: 1, among them "see you"')


# --- the collection ---


@pytest.fixture
def sums(tmp_path, sample_splits, monkeypatch):
    """SHA-256 of the splits of the sample, which is in place of the collection, alone in a folder."""
    (tmp_path / "SMSSpamCollection").write_bytes(gpt_download.SAMPLE.read_bytes())
    monkeypatch.setattr(gpt_download, "COLLECTION_SHA256", gpt_download.SAMPLE_SHA256)
    contents = {split: frame.to_csv(index=None).encode() for split, frame in sample_splits.items()}
    sums = {split: hashlib.sha256(content).hexdigest() for split, content in contents.items()}
    monkeypatch.setattr(gpt_download, "UCI_SPLITS_SHA256", sums)
    return sums


def test_collection_is_split_and_written_once(sums, tmp_path):
    """A run that was killed between two files is completed. The user's own files are left alone."""
    (tmp_path / "test.csv").write_text("my own")
    gpt_download.make_uci_splits(tmp_path)
    assert (tmp_path / "test.csv").read_text() == "my own"
    (tmp_path / "test.csv").unlink()
    first = read(tmp_path)
    assert first.name == "uci" and {split: sha256_of(tmp_path / f"{split}.csv") for split in sums} == sums
    (tmp_path / "test.csv").unlink()
    assert read(tmp_path).name == "uci" and sha256_of(tmp_path / "test.csv") == sums["test"]
    (tmp_path / "SMSSpamCollection").unlink()  # not looked at any more
    again = read(tmp_path)
    assert again.name == "uci" and again.sha256 == first.sha256 and again.class_names == ["ham", "spam"]
    assert [len(first.splits[split]) for split in datasets.SPLITS] == [840, 120, 240]  # 70, 10 and 20%
    assert sum(frame["Label"].sum() for frame in first.splits.values()) == 600  # half of it spam


def test_a_folder_that_cannot_be_written_to(sums, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", Mock(side_effect=PermissionError))
    found = read(tmp_path)
    assert found.name == "uci" and len(found.splits["train"]) == 840 and len(list(tmp_path.iterdir())) == 1


def test_folders_that_the_collection_is_downloaded_into(monkeypatch):
    """The default one, missing or with other files, and one that holds nothing but kept features."""
    monkeypatch.setattr(gpt_download, "fetch_collection", lambda *_: gpt_download.SAMPLE)
    Path("other", "features").mkdir(parents=True)
    for folder in (datasets.DEFAULT_DATA_DIR, "other", datasets.DEFAULT_DATA_DIR):
        with pytest.raises(UserError, match="splits the collection differently"):
            read(folder)
        Path(datasets.DEFAULT_DATA_DIR, "notes").mkdir(parents=True, exist_ok=True)

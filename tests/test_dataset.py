"""The messages: the user's own CSV files, what is wrong with them, and the splits of the collection."""

import hashlib

import pandas as pd
import pytest
from helpers import encoded

import additional_experiments as ae
import gpt_download
from additional_experiments import main, parse_args
from runner import dataset
from runner.files import FileError, sha256_of


def load_splits(options):
    experiment, *_ = parse_args([str(option) for option in options])
    return dataset.load_splits(experiment.data_dir, experiment.dataset)


# --- bad data ---


@pytest.mark.parametrize(
    "split, content, message",
    [
        ("train", "", "the file is empty"),
        ("train", "Label,Text\n", "no messages below the header"),
        ("train", "Label,Message\n0,a\n", "column Text is missing; the columns are Label, Message"),
        ("train", "Class,Text\n0,a\n", "column Label is missing"),
        ("test", "Label,Text\n0,a\n1,\n", "line 3: the text is empty"),
        ("test", "Label,Text\n0,a\n1,   \n", "line 3: the text is empty"),
        ("test", "Label,Text\n0,a\n1\n", "line 3: the text is empty"),
        ("test", "Label,Text\n0,a\n,b\n", 'line 3: label "" is not a whole number'),
        ("train", "Label,Text\n0,a\nspam,b\n", 'line 3: label "spam" is not a whole number'),
        ("train", "Label,Text\n0,a\n1.0,b\n", 'line 3: label "1.0" is not a whole number'),
        ("train", 'Label,Text\n0,"two\nlines"\nx,b\n', 'line 4: label "x" is not a whole number'),
        ("train", "Label,Text\n0,a,b\n", "line 2: more fields than columns"),
        ("train", "Label,Text\n2,a\n1,b\n", "line 3: label 1, but labels start at 0"),
        ("train", "Label,Text\n0,a\n-1,b\n", "line 3: label -1, but labels start at 0"),
        ("train", "Label,Text\n0,a\n2,b\n", "line 3: label 2, but no training message has label 1"),
        ("validation", "Label,Text\n0,a\n2,b\n", "validation.csv, line 3: label 2, which no training message has"),
        ("train", "Label,Text\n-100,a\n-100,b\n", "every training label is the ignored one, -100"),
        ("train", 'Label,Text\n0,"a\n', "unexpected end of data"),
        (
            "train",
            "Label,Text\n0,a\n999999999999,b\n",
            "label 999999999999, but no training message has label 1",
        ),
        ("train", "Label,Text\n0,a\n0,b\n", "every label is 0; a classifier needs two classes or more"),
        ("train", b"Label,Text\n0,\xff\xfe\n", "not UTF-8 text"),
    ],
)
def test_bad_data_is_refused_by_line(nano, data_dir, capsys, split, content, message):
    (data_dir / f"{split}.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(nano) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert f"{split}.csv" in err or message.startswith("every training")


def test_training_labels_that_are_all_ignored(nano, data_dir, capsys):
    (data_dir / "train.csv").write_text("Label,Text\n" + "0,a\n" * 8)
    (data_dir / "validation.csv").write_text("Label,Text\n0,a\n")
    (data_dir / "test.csv").write_text("Label,Text\n0,a\n")
    assert main([*nano, "--ignore_index", "0"]) == 2
    assert "every training label is the ignored one, 0" in capsys.readouterr().err


def test_batch_larger_than_the_training_set(nano, capsys):
    assert main([*nano, "--batch_size", "44"]) == 2
    assert "--batch_size 44: there are only 43 training messages" in capsys.readouterr().err


def test_one_of_three_files_is_not_overwritten(nano, data_dir, capsys):
    (data_dir / "test.csv").unlink()
    before = (data_dir / "train.csv").read_bytes()
    assert main(nano) == 2
    assert "holds train.csv but not test.csv; your own data needs all three" in capsys.readouterr().err
    assert (data_dir / "train.csv").read_bytes() == before and len(list(data_dir.iterdir())) == 2


# --- good data ---


def test_text_is_taken_as_it_is(nano, data_dir):
    """NA is a message, a comma in quotes and a line break are part of one, and so is <|endoftext|>."""
    texts = ["NA", "null", 'a "b", c', "two\nlines", "<|endoftext|>", "ä€😀"]
    frame = pd.DataFrame({"Label": [0, 1] * 3, "Text": texts})
    frame.to_csv(data_dir / "test.csv", index=None)
    splits, name = load_splits(nano)
    assert list(splits["test"]["Text"]) == texts and list(splits["test"]["Label"]) == [0, 1] * 3 and name == "own"
    assert 50256 not in encoded(parse_args([*nano, "--no_padding"])[0])["test"].x


def test_byte_order_mark_and_further_columns(nano, data_dir):
    (data_dir / "test.csv").write_text("\ufeffId,Text,Label\n7,a,1\n", encoding="utf-8")
    splits, _ = load_splits(nano)
    assert splits["test"][["Label", "Text"]].values.tolist() == [[1, "a"]]


def test_three_classes_and_messages_without_a_label(nano, data_dir, capsys):
    frame = pd.read_csv(data_dir / "train.csv")
    frame["Label"] = [0, 1, 2] * 14 + [-100]
    frame.to_csv(data_dir / "train.csv", index=None)
    (data_dir / "test.csv").write_text("Label,Text\n-100,a\n2,b\n")
    [record] = ae.run(parse_args([*nano, "--batch_size", "1"])[0])
    assert (record.train.total, record.test.total) == (42, 1)
    assert "loss nan" not in capsys.readouterr().out


def test_sample_is_split_70_10_20_and_balanced(sample_splits):
    assert [len(sample_splits[split]) for split in dataset.SPLITS] == [840, 120, 240]
    assert sum(frame["Label"].sum() for frame in sample_splits.values()) == 600


def test_collection_is_split_and_written_once(tmp_path, monkeypatch):
    """On the sample in place of the collection. A run that was killed between two files is completed."""
    collection = tmp_path / "SMSSpamCollection"
    collection.write_bytes(gpt_download.SAMPLE.read_bytes())
    monkeypatch.setattr(gpt_download, "COLLECTION_SHA256", gpt_download.SAMPLE_SHA256)
    options = ["--data_dir", tmp_path]
    with pytest.raises(FileError, match="splits the collection differently"):
        load_splits(options)
    assert list(tmp_path.iterdir()) == [collection]

    contents = {s: frame.to_csv(index=None).encode() for s, frame in dataset.balanced_splits(collection).items()}
    sums = {split: hashlib.sha256(content).hexdigest() for split, content in contents.items()}
    monkeypatch.setattr(dataset, "UCI_SPLITS_SHA256", sums)
    splits, name = load_splits(options)
    assert {split: len(frame) for split, frame in splits.items()} == dict(train=840, validation=120, test=240)
    assert name == "uci"
    (tmp_path / "test.csv").unlink()
    assert load_splits(options)[1] == "uci"
    assert sha256_of(tmp_path / "test.csv") == sums["test"]
    collection.unlink()  # not looked at any more
    assert len(load_splits(options)[0]["train"]) == 840

"""The messages: the user's own CSV files, what is wrong with them, and the splits of the collection."""

import hashlib
import os
from pathlib import Path

import pandas as pd
import pytest
from helpers import encoded

import additional_experiments as ae
import gpt_download
from additional_experiments import main, parse_args
from runner.data import datasets
from runner.files import UserError, sha256_of


def load_splits(options):
    experiment, *_ = parse_args([str(option) for option in options])
    return datasets.load_splits(experiment.data_dir, experiment.dataset)


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
        ("train", f"Label,Text\n0,a\n{'1' * 5000},b\n", "line 3: a label of 5000 digits is too large"),
        (
            "train",
            f"Label,Text\n0,a\n1,b{' ' * 1_000_000}c\n",
            "line 3: the text has more than 100,000 whitespace characters in a row",
        ),
        ("test", "Label,Text,Text\n0,a,b\n", "there are 2 columns Text"),
        ("test", "Label,Text,Note,Note\n0,a,b,c\n", "there are 2 columns Note"),
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


def test_a_pipe_is_not_waited_for(nano, data_dir, capsys):
    (data_dir / "test.csv").unlink()
    os.mkfifo(data_dir / "test.csv")
    assert main(nano) == 2
    assert capsys.readouterr().err == f"error: {data_dir}/test.csv: not a regular file\n"


def test_as_many_blanks_as_the_tokenizer_takes():
    text = "a" + " " * datasets.MAX_SPACES + "b"
    assert datasets.problem_of_text(text) is None and len(ae.load_vocabulary().encode_ordinary(text)) > 1000


# --- the folder ---


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(gpt_download, "fetch_collection", lambda *_: pytest.fail("the collection was asked for"))


ADVICE = "make an empty folder to have the collection downloaded into it, or put train.csv, validation.csv and test.csv"


@pytest.mark.parametrize("folder", ["missing", "link", "other files"])
def test_a_folder_from_which_somebody_expects_other_data(no_download, tmp_path, capsys, folder):
    """Nobody is to train on the collection because of a mistyped name."""
    path = tmp_path / "data"
    if folder == "link":
        path.symlink_to(tmp_path / "nowhere")
    if folder == "other files":
        path.mkdir()
        (path / "training.csv").touch()
    assert main(["--weights", "random", "--data_dir", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: --data_dir {path} ") and ADVICE in err and err.count("\n") == 1


def test_links_of_the_three_files_that_lead_nowhere(nano, no_download, data_dir, tmp_path_factory, capsys):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for split in datasets.SPLITS:
        (data_dir / f"{split}.csv").rename(elsewhere / f"{split}.csv")
        (data_dir / f"{split}.csv").symlink_to(elsewhere / f"{split}.csv")
    assert main([*nano, "--quiet"]) == 0
    for split in datasets.SPLITS:
        (elsewhere / f"{split}.csv").unlink()
    assert main(nano) == 2
    assert f"train.csv is a link to {elsewhere}/train.csv, which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", [datasets.DEFAULT_DATA_DIR, "made"])
def test_the_default_folder_is_made_and_any_other_must_be_there(monkeypatch, capsys, name):
    """What a failed download made is removed again, what the user made stays."""

    def fail(*_):
        raise UserError("no network", status=1)

    monkeypatch.setattr(gpt_download, "fetch_collection", fail)
    if name == "made":
        Path(name).mkdir()
    assert main(["--weights", "random", "--data_dir", name]) == 1
    assert capsys.readouterr().err == "error: no network\n"
    assert Path(name).is_dir() == (name == "made")


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


def test_without_padding_nothing_is_cut_to_the_longest_training_message(nano, data_dir):
    """As in the original. The limit is the model's, or the number that is asked for."""
    long = "word " * 1100
    (data_dir / "test.csv").write_text(f"Label,Text\n0,{long}\n1,{long[:300]}\n")
    for options, expected in (
        (["--no_padding"], [1024, 61]),
        (["--no_padding", "--context_length", "50"], [50, 50]),
        (["--no_padding", "--context_length", "model_context_length"], [1024, 61]),
        ([], [12, 12]),
    ):
        experiment, *_ = parse_args([*nano, *options])
        assert encoded(experiment)["test"].lengths.tolist() == expected
        data = ae.prepare_data(experiment)
        assert data.longest == max(expected) and data.limit >= data.longest


def test_three_classes_and_messages_without_a_label(nano, data_dir, capsys):
    frame = pd.read_csv(data_dir / "train.csv")
    frame["Label"] = [0, 1, 2] * 14 + [-100]
    frame.to_csv(data_dir / "train.csv", index=None)
    (data_dir / "test.csv").write_text("Label,Text\n-100,a\n2,b\n")
    [record] = ae.run(parse_args([*nano, "--batch_size", "1"])[0])
    assert (record.train.total, record.test.total) == (42, 1)
    assert "loss nan" not in capsys.readouterr().out


def test_sample_is_split_70_10_20_and_balanced(sample_splits):
    assert [len(sample_splits[split]) for split in datasets.SPLITS] == [840, 120, 240]
    assert sum(frame["Label"].sum() for frame in sample_splits.values()) == 600


def test_collection_is_split_and_written_once(tmp_path, monkeypatch):
    """On the sample in place of the collection. A run that was killed between two files is completed."""
    collection = tmp_path / "SMSSpamCollection"
    collection.write_bytes(gpt_download.SAMPLE.read_bytes())
    monkeypatch.setattr(gpt_download, "COLLECTION_SHA256", gpt_download.SAMPLE_SHA256)
    options = ["--data_dir", tmp_path]
    with pytest.raises(UserError, match="splits the collection differently"):
        load_splits(options)
    assert list(tmp_path.iterdir()) == [collection]

    contents = {s: frame.to_csv(index=None).encode() for s, frame in datasets.balanced_splits(collection).items()}
    sums = {split: hashlib.sha256(content).hexdigest() for split, content in contents.items()}
    monkeypatch.setattr(datasets, "UCI_SPLITS_SHA256", sums)
    splits, name = load_splits(options)
    assert {split: len(frame) for split, frame in splits.items()} == dict(train=840, validation=120, test=240)
    assert name == "uci"
    (tmp_path / "test.csv").unlink()
    assert load_splits(options)[1] == "uci"
    assert sha256_of(tmp_path / "test.csv") == sums["test"]
    collection.unlink()  # not looked at any more
    assert len(load_splits(options)[0]["train"]) == 840

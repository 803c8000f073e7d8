"""Lines of results.csv: appended by many processes at once, whole or not at all, and read back."""

import codecs
import csv
import errno

import pytest
from helpers import made_up_record, no_file_above, processes

from runner import locks
from runner.files import UserError
from runner.results.accuracy import Accuracy
from runner.results.results_file import append_record, read_records


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_five(path, number, barrier):
    barrier.wait()
    for run in range(5):
        append_record(path, made_up_record(f"{number}-{run}"))


def test_twenty_processes_append_at_once(tmp_path):
    path, barrier = tmp_path / "results.csv", processes().Barrier(20)
    writers = [processes().Process(target=append_five, args=(path, number, barrier)) for number in range(20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    lines = lines_of(path)
    assert sorted(line["run"] for line in lines) == sorted(f"{n}-{run}" for n in range(20) for run in range(5))
    assert all(line["device_name"] == 'an "odd", name' and line["minutes"] == "3.5" for line in lines)
    assert path.read_text().count("run,date,row,") == 1


def test_a_file_with_other_columns_stays_as_it_is(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    (tmp_path / "results-2.csv").write_text("something else\n")
    assert append_record(path, made_up_record("x")) == (tmp_path / "results-3.csv", True)
    assert append_record(path, made_up_record("y")) == (tmp_path / "results-3.csv", True)
    assert path.read_text() == "a,b\n1,2\n" and len(lines_of(tmp_path / "results-3.csv")) == 2


def test_a_record_is_written_once(tmp_path):
    path = tmp_path / "results.csv"
    for run in ("x", "y", "x"):
        append_record(path, made_up_record(run))
    assert [line["run"] for line in lines_of(path)] == ["x", "y"]


def test_an_incomplete_line_spoils_no_other(tmp_path):
    path = tmp_path / "results.csv"
    append_record(path, made_up_record("x"))
    with open(path, "a") as file:
        file.write("y,1,285")
    append_record(path, made_up_record("z", seed=124))
    records, damaged = read_records(path)
    assert len(records) == 2 and damaged == [3]


def test_a_full_disk_leaves_no_part_of_a_made_up_record(tmp_path):
    path = tmp_path / "results.csv"
    append_record(path, made_up_record("x"))
    before = path.read_bytes()
    with no_file_above(len(before) + 10), pytest.raises(OSError):
        append_record(path, made_up_record("y"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("a,b\n1,2\n", "column row is missing"),
        ("", "column row"),
        (b"\xff\xfe", "cannot be read"),
        ('"' + "a" * 200_000, "column row is missing"),
    ],
)
def test_a_file_that_is_no_results_file(tmp_path, content, message):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_records(path)


def three_records(path, **changes):
    for run, seed in (("x", 123), ("y", 124), ("z", 125)):
        append_record(path, made_up_record(run, seed=seed, **changes))
    return path.read_bytes().splitlines(keepends=True)


def test_a_line_that_ends_inside_a_quoted_cell_swallows_no_other(tmp_path):
    path = tmp_path / "results.csv"
    header, first, second, third = three_records(path)
    cut = second[: second.index(b"last block, last") + 10]  # inside the quotes of the configuration
    path.write_bytes(header + first + cut + b"\n" + third)
    records, damaged = read_records(path)
    assert [record.seed for record in records] == [123, 125] and damaged == [3]


def test_files_that_were_joined_are_one(tmp_path):
    path = tmp_path / "results.csv"
    header, *lines = three_records(path)
    path.write_bytes(header + lines[0] + header + lines[1] + lines[2])
    records, damaged = read_records(path)
    assert [record.seed for record in records] == [123, 124, 125] and damaged == []


def test_a_spreadsheet_may_have_saved_the_file(tmp_path):
    path = tmp_path / "results.csv"
    lines = three_records(path)
    path.write_bytes(codecs.BOM_UTF8 + b"".join(lines).replace(b"\n", b"\r\n"))
    assert append_record(path, made_up_record("new", seed=126)) == (path, True)
    records, damaged = read_records(path)
    assert [record.seed for record in records] == [123, 124, 125, 126] and damaged == []


@pytest.mark.parametrize(
    "column, value",
    [
        ("test_correct", "301"),
        ("test_correct", "-1"),
        ("test_total", "9" * 400),
        ("test_total", "300.0"),
        ("seed", "9" * 5000),
        ("row", "one"),
        ("minutes", "nan"),
        ("minutes", "-1"),
        ("minutes", "1e999"),
        ("minutes", "1e308"),
    ],
)
def test_impossible_values_are_told_by_line(tmp_path, column, value):
    path = tmp_path / "results.csv"
    three_records(path)
    lines = lines_of(path)
    lines[1][column] = value
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    records, damaged = read_records(path)
    assert [record.seed for record in records] == [123, 125] and damaged == [3]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "two\nlines", "a\r\nb", "a;b", 'a"b', "'a"])
def test_texts_are_no_formulas_and_have_no_line_breaks(tmp_path, name):
    path = tmp_path / "results.csv"
    append_record(path, made_up_record("x", weights=name, configuration=name, device_name=name))
    assert path.read_bytes().count(b"\n") == 2 and b"\r" not in path.read_bytes()
    [line] = lines_of(path)
    for column in ("weights", "configuration", "device_name"):
        assert not line[column].startswith(("=", "+", "-", "@"))
    [record], _ = read_records(path)
    assert record.device_name == record.configuration == " ".join(name.split())


def test_where_there_are_no_locks(tmp_path, monkeypatch):
    """As some network file systems answer: each record has a file of its own, and the caller is told."""

    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    path = tmp_path / "results.csv"
    assert append_record(path, made_up_record("x")) == (path, False)
    second = tmp_path / "results-2.csv"
    for _ in range(2):  # the second time by a run that was interrupted before it had noted that its record is there
        assert append_record(path, made_up_record("y")) == (second, False)
    assert [line["run"] for line in lines_of(path) + lines_of(second)] == ["x", "y"]


# The columns of the first version, 1,829 lines in one script: its files must stay readable.
COLUMNS = (
    "run,date,row,configuration,model_size,weights,trainable_layers,lora_rank,lora_alpha,trainable_token_pos,"
    "average_embeddings,context_length,no_padding,disable_causal_mask,ignore_index,batch_size,accumulation_steps,"
    "num_epochs,learning_rate,weight_decay,seed,device,precision,features,data_dir,dataset,weights_sha256,data,"
    "data_sha256,tokens_per_message,train_correct,train_total,train_fraction,validation_correct,validation_total,"
    "validation_fraction,test_correct,test_total,test_fraction,minutes,seconds,peak_memory_gb,device_name,python,torch,"
    "tiktoken,pandas"
)


def test_a_file_of_the_first_version_is_read_and_left_as_it_is(tmp_path):
    """What comes after it stands beside it, and the report reads both."""
    path = tmp_path / "results.csv"
    line = (
        'old-124,2026-11-20T12:00:00+00:00,1,"last block, last token",gpt2-small (124M),pretrained,last_block,8,8.0,'
        "last,False,longest_training_example,False,False,-100,8,1,5,5e-05,0.1,124,auto,fp32,auto,sms_spam_collection,uci,"
        "248dfc39,uci,0123,120,1005,1040,0.966,148,149,0.993,285,300,0.95,0.28,30.1,1.5,A100,3.11.7,2.13.0,0.14.0,3.1.1"
    )
    path.write_text(f"{COLUMNS}\n{line}\n")
    assert append_record(path, made_up_record("x")) == (tmp_path / "results-2.csv", True)
    assert path.read_text() == f"{COLUMNS}\n{line}\n"
    [old], damaged = read_records(path)
    assert (old.row, old.seed, old.test, old.minutes, old.device_name) == (1, 124, Accuracy(285, 300), 0.28, "A100")
    assert old.settings["lora_alpha"] == 8 and old.settings["no_padding"] is False and damaged == []
    assert old.confusions is None and old.history is None

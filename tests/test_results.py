"""Accuracies and their intervals, rows, records, the report, pictures, files of tensors."""

import csv
import multiprocessing
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binomtest

import results
from gpt_download import FileError
from results import Accuracy, Published, Result, markdown_header, markdown_mean_row, markdown_row

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


def test_accuracy_in_full():
    assert Accuracy(285, 300).in_full == "95.00% (285/300, 95% interval 91.9–96.9)"
    assert Accuracy(0, 0).interval == (0, 1)
    assert Accuracy(300, 300).interval[1] == 1 and Accuracy(0, 3).interval[0] == 0  # exactly, and not by a hair


@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (0, 300), (300, 300), (285, 300), (17, 149), (3, 7)])
def test_interval_is_that_of_scipy(correct, total):
    theirs = binomtest(correct, total).proportion_ci(method="wilson")
    assert Accuracy(correct, total).interval == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(
    "correct, total, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_is_the_published_one(correct, total, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=5e-5)


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


def test_row_of_several_seeds():
    several = [replace(RESULT, test=Accuracy(correct, 300)) for correct in (282, 285, 288)]
    assert "| 95.00% ± 1.00 | 0.28 ± 0.00 min |" in markdown_mean_row(several)
    assert "| mean ± standard deviation of 3 seeds |" in markdown_mean_row(several)


# --- records ---


def record(run, **further):
    accuracies = {f"{s}_{part}": n for s in results.SPLITS for part, n in (("correct", 285), ("total", 300))}
    return (
        dict(run=run, row=1, configuration="as it comes", seed=123, **accuracies, minutes=3.5)
        | dict(device_name='an "odd", name')
        | further
    )


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def processes():
    """Python with all that takes long to import, from which a process starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["additional_experiments", "torch._dynamo", "test_results", "test_cut_off"])
    return context


def append_some(path, number, barrier):
    barrier.wait()
    for run in range(5):
        results.append_record(path, record(f"{number}-{run}"))


def test_twenty_processes_append_at_once(tmp_path):
    path, barrier = tmp_path / "results.csv", processes().Barrier(20)
    writers = [processes().Process(target=append_some, args=(path, number, barrier)) for number in range(20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    lines = lines_of(path)
    assert sorted(line["run"] for line in lines) == sorted(f"{n}-{run}" for n in range(20) for run in range(5))
    assert all(line["device_name"] == 'an "odd", name' and line["minutes"] == "3.5" for line in lines)
    assert path.read_text().count("run,row,") == 1


def test_a_file_with_other_columns_stays_as_it_is(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    (tmp_path / "results-2.csv").write_text("something else\n")
    assert results.append_record(path, record("x")) == tmp_path / "results-3.csv"
    assert results.append_record(path, record("y")) == tmp_path / "results-3.csv"
    assert path.read_text() == "a,b\n1,2\n" and len(lines_of(tmp_path / "results-3.csv")) == 2


def test_a_record_is_written_once(tmp_path):
    path = tmp_path / "results.csv"
    for run in ("x", "y", "x"):
        results.append_record(path, record(run))
    assert [line["run"] for line in lines_of(path)] == ["x", "y"]


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "results.csv"
    results.append_record(path, record("x"))
    with open(path, "a") as file:
        file.write("y,1,285")
    results.append_record(path, record("z", seed=124))
    runs, broken = results.read_runs(path)
    assert len(runs) == 2 and broken == [3]


@contextmanager
def no_file_above(size):
    """The system refuses to let any file of this process grow beyond `size` bytes: what a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path):
    path = tmp_path / "results.csv"
    results.append_record(path, record("x"))
    before = path.read_bytes()
    with no_file_above(len(before) + 10), pytest.raises(OSError):
        results.append_record(path, record("y"))
    assert path.read_bytes() == before


# --- the report ---

ROWS = {
    1: ("", "last block, last token", Published(96.63, 99.33, 95.00, 0.28)),
    2: ("--trainable_token_pos first", "first token", Published(78.46, 80.54, 75.00, 0.28)),
    3: ("--trainable_layers last_layer", "last layer", Published(78.65, 79.87, 72.00, 0.25)),
}


def some_runs(path):
    results.append_record(path, record("a"))
    results.append_record(path, record("b", test_correct=291, minutes=4.5))
    results.append_record(path, record("c", row=3))
    for run, seed in (("d", 123), ("e", 124), ("again", 124)):
        results.append_record(path, record(run, row="", configuration="gpt2-nano (7M), sample data", seed=seed))
    return results.read_runs(path)[0]


def test_report(tmp_path):
    header, rule, first, second, third, *_, _, others, _, other = results.report(
        some_runs(tmp_path / "r.csv"), ROWS
    ).splitlines()
    assert header.count("|") == rule.count("|") == first.count("|") == second.count("|") == third.count("|")
    both = Accuracy(288, 300).bounds  # the mean of two runs on the same 300 messages
    assert "| 2 | 95.00% ± 0.00 [91.9–96.9]; 96.63, -1.63, inside | 95.00% ± 0.00 [91.9–96.9]; 99.33" in first
    assert f"| 96.00% ± 1.41 [{both}]; 95.00, +1.00, inside | 4.00 ± 0.71 min; 0.28 |" in first
    assert second == (
        "| 2 | `--trainable_token_pos first` | 0 "
        "| missing; 78.46 | missing; 80.54 | missing; 75.00 | missing; 0.28 | - |"
    )
    assert "| 1 | 95.00% [91.9–96.9]; 78.65, +16.35, outside |" in third and "| 3.50 min; 0.25 |" in third
    assert others.startswith("| Other runs | Runs | Training acc |") and others.count("|") == other.count("|")
    # the third has the seed and the result of the second: nothing new
    assert other.startswith("| gpt2-nano (7M), sample data | 2 | 95.00% ± 0.00 [91.9–96.9] |")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("a,b\n1,2\n", "column row is missing"),
        ("", "column row"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_report_of_no_records(tmp_path, content, message):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=message):
        results.read_runs(path)


# --- pictures ---

SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


@pytest.mark.parametrize("suffix", results.PICTURES)
def test_pictures(tmp_path, suffix):
    history = SimpleNamespace(
        steps=[0, 50, 100],
        train_losses=[1.0, 0.5, 0.1],
        val_losses=[1.0, 0.6, 0.4],
        train_accuracies=[Accuracy(30, 40)],
        val_accuracies=[Accuracy(35, 40)],
    )
    results.plot_history(tmp_path / f"one{suffix}", [history], per_epoch=105, batch_size=8)
    results.plot_history(tmp_path / f"seeds{suffix}", [history, history], per_epoch=105, batch_size=8)
    results.plot_report(tmp_path / f"report{suffix}", some_runs(tmp_path / "r.csv"), ROWS)
    results.plot_report(tmp_path / f"nothing{suffix}", [], ROWS)
    pictures = [path for path in tmp_path.iterdir() if path.suffix == suffix]
    assert len(pictures) == 4 and all(path.read_bytes().startswith(SIGNATURES[suffix]) for path in pictures)


def test_report_picture_names_each_row(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as letters
        results.plot_report(tmp_path / "report.svg", some_runs(tmp_path / "r.csv"), ROWS)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "report.svg").read_text())
    for text in (
        "last block, last token (n\u00a0=\u00a02)   1",
        "first token   2",
        "last layer   3",
        "missing",
        "published",
    ):
        assert text in texts


# --- files of tensors ---

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(3.0), "rng": torch.get_rng_state()}
TENSORS |= {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, dtype=torch.long)}


def test_tensors_come_back_as_they_were(tmp_path):
    path = tmp_path / "file"
    results.write_tensors(path, "checkpoint", dict(loss=0.1, text="ä"), TENSORS)
    description, tensors = results.read_tensors(path, "checkpoint")
    assert description == dict(loss=0.1, text="ä") and tensors.keys() == TENSORS.keys()
    assert all(tensors[name].equal(tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert [path] == list(tmp_path.iterdir())


def damaged_at(position):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return damage


def in_the_next_format(path):
    metadata = dict(kind="checkpoint", format=str(results.FORMAT + 1), description="{}", sha256="")
    save_file({"a": torch.ones(1)}, path, metadata)


@pytest.mark.parametrize(
    "damage, message",
    [
        (damaged_at(-1), "is damaged"),
        (damaged_at(-1000), "is damaged"),
        (damaged_at(3), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:4]), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(b""), "cannot be read as a checkpoint"),
        (lambda path: path.write_text("my diary\n" * 100), "cannot be read as a checkpoint"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "is no checkpoint of this program"),
        (lambda path: results.write_tensors(path, "other", {}, TENSORS), "is no checkpoint of this program"),
        (in_the_next_format, "in format 2; this program knows format 1"),
    ],
)
def test_files_that_are_not_what_was_written(tmp_path, damage, message):
    path = tmp_path / "file"
    results.write_tensors(path, "checkpoint", dict(loss=0.1), TENSORS)
    damage(path)
    with pytest.raises(FileError, match=message):
        results.read_tensors(path, "checkpoint")


def test_any_flipped_byte_is_found(tmp_path):
    path = tmp_path / "file"
    results.write_tensors(path, "checkpoint", dict(loss=0.1), {"a": torch.arange(4.0)})
    whole = path.read_bytes()
    padding = set(range(len(whole) - 16 - 8, len(whole) - 16))  # spaces behind the header, which say nothing
    for position in set(range(len(whole))) - padding:
        damaged_at(position)(path)
        with pytest.raises(FileError):
            results.read_tensors(path, "checkpoint")
        path.write_bytes(whole)


def test_what_was_there_stays_if_the_disk_is_full(tmp_path):
    path = tmp_path / "file"
    results.write_tensors(path, "checkpoint", {}, TENSORS)
    before = path.read_bytes()
    with no_file_above(10_000), pytest.raises(OSError, match="File too large"):
        results.write_tensors(path, "checkpoint", {}, {"a": torch.zeros(10_000)})
    assert path.read_bytes() == before and [path] == list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / "file.999999999.part").mkdir()  # no system has as many processes
    (tmp_path / "file.999999999.part" / ".tmp123").write_bytes(bytes(100))
    results.write_tensors(tmp_path / "file", "checkpoint", {}, TENSORS)
    assert [tmp_path / "file"] == list(tmp_path.iterdir())


def test_another_run_is_refused_by_the_setting_that_differs(tmp_path):
    path = tmp_path / "file"
    assert results.read_checkpoint(path, dict(seed=1)) is None
    results.write_checkpoint(path, dict(seed=1, device="cpu"), dict(n=[1.5, None]), TENSORS)
    assert results.read_checkpoint(path, dict(seed=1, device="cpu"))[0] == dict(n=[1.5, None])
    with pytest.raises(FileError, match="is of a run with device cpu, not cuda"):
        results.read_checkpoint(path, dict(seed=1, device="cuda"))
    with pytest.raises(FileError, match="is of a run with momentum None, not 1"):
        results.read_checkpoint(path, dict(seed=1, device="cpu", momentum=1))

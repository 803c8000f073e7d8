"""Files that are whole or absent, checksums, files of tensors, and what else is made of such files."""

import os
import time

import pytest
import torch
from helpers import damaged_at, no_file_above
from safetensors.torch import save_file

from runner import files
from runner.data.tensor_files import read_tensors, write_tensors
from runner.files import UserError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(3.0), "rng": torch.get_rng_state()}
TENSORS |= {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, dtype=torch.long)}


def test_tensors_come_back_as_they_were(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, "checkpoint", 1, dict(loss=0.1, text="ä"), TENSORS)
    description, tensors = read_tensors(path, "checkpoint", 1)
    assert description == dict(loss=0.1, text="ä") and tensors.keys() == TENSORS.keys()
    assert all(tensors[name].equal(tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert [path] == list(tmp_path.iterdir())


def in_the_next_format(path):
    metadata = dict(kind="checkpoint", format="2", description="{}", sha256="")
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
        (lambda path: save_file({"a": torch.ones(1)}, path), "is not a checkpoint of this program"),
        (lambda path: write_tensors(path, "other", 1, {}, TENSORS), "is not a checkpoint of this program"),
        (in_the_next_format, "in format 2; this program reads format 1"),
    ],
)
def test_files_that_are_not_what_was_written(tmp_path, damage, message):
    path = tmp_path / "file"
    write_tensors(path, "checkpoint", 1, dict(loss=0.1), TENSORS)
    damage(path)
    with pytest.raises(UserError, match=message):
        read_tensors(path, "checkpoint", 1)


def test_any_flipped_byte_is_found(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, "checkpoint", 1, dict(loss=0.1), {"a": torch.arange(4.0)})
    whole = path.read_bytes()
    padding = set(range(len(whole) - 16 - 8, len(whole) - 16))  # spaces behind the header, which say nothing
    for position in set(range(len(whole))) - padding:
        damaged_at(position)(path)
        with pytest.raises(UserError):
            read_tensors(path, "checkpoint", 1)
        path.write_bytes(whole)


def test_what_was_there_stays_if_the_disk_is_full(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, "checkpoint", 1, {}, TENSORS)
    before = path.read_bytes()
    with no_file_above(10_000), pytest.raises(OSError, match="File too large"):
        write_tensors(path, "checkpoint", 1, {}, {"a": torch.zeros(10_000)})
    assert path.read_bytes() == before and [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, age, is_removed",
    [
        ("file.HERE.999999999.0123abcd.part", 0, True),
        ("file.HERE.SELF.0123abcd.part", 0, False),  # at work
        ("file.elsewhere.999999999.0123abcd.part", 0, False),  # on another host, or in another container
        ("file.elsewhere.SELF.0123abcd.part", 25 * 3600, True),
        ("file.999999999.part", 0, False),  # of an earlier version
        ("file.999999999.part", 25 * 3600, True),
        ("other.HERE.999999999.0123abcd.part", 25 * 3600, False),
    ],
)
def test_what_a_killed_process_left_is_removed(tmp_path, name, age, is_removed):
    """HERE is this host, SELF this process; no system has as many processes as 999,999,999."""
    name = name.replace("HERE", files.host_name()).replace("SELF", str(os.getpid()))
    folder = tmp_path / name
    folder.mkdir()
    (folder / ".tmp123").write_bytes(bytes(100))
    for path in (folder / ".tmp123", folder):
        os.utime(path, (time.time() - age,) * 2)
    write_tensors(tmp_path / "file", "checkpoint", 1, {}, TENSORS)
    assert {path.name for path in tmp_path.iterdir()} == {"file", *([] if is_removed else [name])}


def test_a_writer_that_takes_days_is_left_alone(tmp_path):
    """A folder is as old as the last write to what is in it."""
    folder = tmp_path / "file.elsewhere.1.0123abcd.part"
    folder.mkdir()
    (folder / "file").write_bytes(bytes(100))
    os.utime(folder, (time.time() - 7 * 24 * 3600,) * 2)
    write_tensors(tmp_path / "file", "checkpoint", 1, {}, TENSORS)
    assert folder.exists()


def test_two_writers_of_one_process_do_not_meet(tmp_path):
    with files.atomic_write(tmp_path / "file") as first, files.atomic_write(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_pipe_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.write_bytes(tmp_path / "pipe", b"content")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_the_mode_of_a_file_is_kept(tmp_path):
    path = tmp_path / "file"
    files.write_bytes(path, b"before")
    path.chmod(0o600)
    files.write_bytes(path, b"after")
    assert path.read_bytes() == b"after" and path.stat().st_mode & 0o777 == 0o600


def test_values_that_are_not_finite_are_named():
    good = {"a": torch.ones(3), "order": torch.arange(3), "none": torch.empty(0)}
    files.require_finite(good, "tensor")
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with pytest.raises(files.NonFiniteError, match="tensor b has values that are infinite or not a number"):
                files.require_finite(good | {"b": torch.tensor([1.0, value, 2.0]).to(dtype)}, "tensor")

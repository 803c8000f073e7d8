"""Rows in a file: indexed like a tensor, written whole or not at all, readable by everybody."""

import json
import os

import pytest
import torch
from helpers import damaged_at, no_file_above
from safetensors import safe_open

from runner.data import tensor_files
from runner.data.tensor_files import HEADER_BYTES, create_rows, open_rows, write_tensors
from runner.files import UserError

SHAPES = {"train": (7, 3), "test": (2, 3)}


def written(path, version=1):
    """What was written: {name: tensor}."""
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    with create_rows(path, "kind", version, SHAPES) as new:
        for name, tensor in tensors.items():
            order = torch.randperm(len(tensor))
            new.rows[name][order] = tensor[order]
        new.description = dict(text="ä", seconds=1.5)
    return tensors


def read(path):
    file = open(path, "rb", buffering=0)
    description, rows = open_rows(file, "kind", 1)
    return description, {name: matrix[torch.arange(matrix.shape[0])] for name, matrix in rows.items()}


def test_rows_come_back_as_they_were(tmp_path):
    tensors = written(tmp_path / "file")
    description, found = read(tmp_path / "file")
    assert description == dict(text="ä", seconds=1.5)
    assert list(found) == list(tensors) and all(found[name].equal(tensors[name]) for name in tensors)


def test_any_library_reads_the_file(tmp_path):
    tensors = written(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert all(file.get_tensor(name).equal(tensor) for name, tensor in tensors.items())
        assert json.loads(file.metadata()["description"]) == dict(text="ä", seconds=1.5)


@pytest.mark.parametrize("indices", [[0], [[3, 4, 5], [5, 5, 0]], [6, 5, 4], [1, 2, 4, 5], [2, 2]])
def test_rows_are_indexed_like_a_tensor(tmp_path, indices):
    tensors = written(tmp_path / "file")
    with open(tmp_path / "file", "rb", buffering=0) as file:
        rows = open_rows(file, "kind", 1)[1]["train"]
        assert rows[torch.tensor(indices)].equal(tensors["train"][torch.tensor(indices)])


def test_only_the_rows_asked_for_are_read(tmp_path):
    written(tmp_path / "file")
    with open(tmp_path / "file", "rb", buffering=0) as file:
        rows = open_rows(file, "kind", 1)[1]["train"]
        reads = []

        class Counting:
            seek = file.seek

            def readinto(self, buffer):
                reads.append(buffer.nbytes)
                return file.readinto(buffer[:50])  # as some file systems do

        rows.file = Counting()
        rows[torch.tensor([[2, 3, 4, 4], [0, 1, 1, 1]])]
        assert reads == [60, 10]  # five rows in a run, pads once; and what was missing


def test_a_file_without_description_is_not_kept(tmp_path):
    with create_rows(tmp_path / "file", "kind", 1, SHAPES) as new:
        new.rows["test"][torch.arange(2)] = torch.ones(2, 3)
        assert new.rows["test"][torch.arange(2)].equal(torch.ones(2, 3))  # readable meanwhile
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_there_is_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), create_rows(tmp_path / "file", "kind", 1, SHAPES) as new:
        new.description = {}
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_description_that_is_too_long_costs_the_file_and_nothing_else(tmp_path):
    with pytest.raises(OSError, match="the description is too long"):
        with create_rows(tmp_path / "file", "kind", 1, SHAPES) as new:
            new.description = "x" * HEADER_BYTES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    with no_file_above(HEADER_BYTES), pytest.raises(OSError, match="File too large"):
        with create_rows(tmp_path / "file", "kind", 1, SHAPES):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gets_full_while_rows_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "reserve", lambda file, size: None)
    with no_file_above(HEADER_BYTES + 4 * 3 * 4), pytest.raises(OSError):
        with create_rows(tmp_path / "file", "kind", 1, SHAPES) as new:
            new.rows["train"][torch.arange(7)] = torch.ones(7, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_became_shorter(tmp_path):
    written(tmp_path / "file")
    with open(tmp_path / "file", "rb", buffering=0) as file:
        rows = open_rows(file, "kind", 1)[1]["test"]
        os.truncate(tmp_path / "file", HEADER_BYTES + 10)
        with pytest.raises(OSError, match="the file has become shorter"):
            rows[torch.tensor([1])]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(b""), "cannot be read as a kind"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read as a kind"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: its SHA-256 differs"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is damaged: its SHA-256 differs"),
        (lambda path: path.write_bytes(os.urandom(HEADER_BYTES + 10)), "cannot be read as a kind"),
        (lambda path: path.write_bytes((HEADER_BYTES - 8).to_bytes(8, "little") + b"[1]"), "cannot be read as a kind"),
        (lambda path: path.write_bytes(b" " * 8 + b'{"__metadata__": {}}'), "cannot be read as a kind"),
        (lambda path: write_tensors(path, "kind", 1, {}, {"a": torch.ones(3)}), "cannot be read as a kind"),
        (lambda path: written(path, version=2), "is a kind in format 2; this program reads format 1"),
        (damaged_at(-1), "is damaged: its SHA-256 differs"),
        (damaged_at(HEADER_BYTES), "is damaged: its SHA-256 differs"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, damage, message):
    path = tmp_path / "file"
    written(path)
    damage(path)
    with pytest.raises(UserError, match=message):
        read(path)


def test_every_byte_that_says_something_is_protected(tmp_path):
    path = tmp_path / "file"
    written(path)
    whole = path.read_bytes()
    said = len(whole[:HEADER_BYTES].rstrip())
    for position in [*range(said), *range(HEADER_BYTES, len(whole))]:
        damaged_at(position)(path)
        with pytest.raises(UserError):
            read(path)
        path.write_bytes(whole)

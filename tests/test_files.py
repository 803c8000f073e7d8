"""Files that are whole or absent, paths that are refused, values that are not finite."""

import os
from pathlib import Path

import pytest
import torch
from helpers import no_file_above

import additional_experiments as ae
from runner import files


def test_what_was_there_stays_if_writing_fails():
    path = Path("file")
    files.write_bytes(path, b"before")
    with no_file_above(10_000), pytest.raises(OSError, match="File too large"):
        files.write_bytes(path, bytes(20_000))
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before" and os.listdir() == ["file"]


def test_a_file_is_on_disk_before_it_gets_its_name(monkeypatch):
    """The power fails just after the renaming: the system, a pretended one, has written what was flushed to disk."""
    fsync, replace, on_disk = os.fsync, os.replace, {}

    def flush(descriptor):
        fsync(descriptor)
        on_disk[os.fstat(descriptor).st_ino] = os.pread(descriptor, 100, 0)

    def rename(source, target):
        content = on_disk.get(os.stat(source).st_ino, b"")
        replace(source, target)
        Path(target).write_bytes(content)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    files.write_bytes(Path("file"), b"content")
    assert Path("file").read_bytes() == b"content"


def test_two_writers_of_one_file():
    with files.atomic_write(Path("file")) as first, files.atomic_write(Path("file")) as second:
        first.write_text("first")
        second.write_text("second")
    assert Path("file").read_text() == "first" and os.listdir() == ["file"]


def test_name_and_mode_of_a_file(tmp_path):
    """The name may be as long as the file system takes; the mode is that of any new file, whatever a library sets."""
    path = tmp_path / ("ä" * 125 + ".png")  # 254 bytes
    (tmp_path / "other").touch()
    with files.atomic_write(path) as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)
        assert temporary.suffix == ".png"
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_keeps_leading_to_its_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    files.write_bytes(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_bytes() == b"content"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_a_device_and_a_link_to_itself_are_never_replaced(quick, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", "/dev/null", tmp_path / "loop"):
        assert ae.main([*quick, "--checkpoint", str(path)]) == 2
        assert capfd.readouterr().err == f"error: --checkpoint {path} is not a regular file\n"
    assert (tmp_path / "pipe").is_fifo()


def test_values_that_are_not_finite_are_named():
    good = {"a": torch.ones(3), "order": torch.arange(3), "none": torch.empty(0)}
    files.require_finite(good, "tensor")
    for value in (float("nan"), -float("inf")):
        with pytest.raises(files.NonFiniteError, match="tensor b has values that are infinite or not a number"):
            files.require_finite(good | {"b": torch.tensor([1.0, value, 2.0]).bfloat16()}, "tensor")


def test_windows_may_deny_a_replacement_for_a_moment(monkeypatch):
    """A virus scanner has the file open."""
    denied, replace = [], os.replace

    def deny(source, target):
        if len(denied) < 3:
            denied.append(target)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", deny)
    with monkeypatch.context() as patch:
        patch.setattr(files.sys, "platform", "win32")
        files.write_bytes(Path("file"), b"content")
    assert Path("file").read_bytes() == b"content" and len(denied) == 3
    denied.clear()
    if os.name != "nt":
        with pytest.raises(PermissionError):
            files.write_bytes(Path("file"), b"other")

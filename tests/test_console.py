"""What is printed, and what becomes of errors: exit status, closed streams."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import end_together, start_together

import additional_experiments as ae
from runner import console
from runner.console import Console, exit_status
from runner.files import NonFiniteError, UserError


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("a"), 2, "error: a\n"),
        (UserError("a", status=1), 1, "error: a\n"),
        (NonFiniteError("a"), 1, "error: a\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_a_line_and_an_exit_status(capsys, error, status, message):
    def fail():
        raise error

    assert exit_status(fail) == status
    assert capsys.readouterr() == ("", message)


def test_errors_of_the_program_are_raised():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_a_log_gets_a_line_of_progress_every_30_seconds(monkeypatch, capsys):
    with Console().progress("features", 50, "message") as bar:
        for _ in range(50):
            bar.update(1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "LOG_SECONDS", 0.1)
    for quiet, expected in ((False, True), (True, False)):
        with Console(quiet).progress("features", 50, "message") as bar:
            for _ in range(50):
                time.sleep(0.01)
                bar.update(1)
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == "" and bool(lines) == expected and len(lines) < 10
        assert all(line.startswith("features: ") and "/50 [" in line and "\r" not in line for line in lines)


def print_and_die():
    sys.stdout.reconfigure(line_buffering=False, write_through=False)  # as Python does for a file
    Console().info("Ep 1")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_has_printed_its_lines(tmp_path):
    assert end_together(start_together(1, tmp_path, print_and_die), tmp_path) == ([-signal.SIGKILL], "Ep 1\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams(nano):
    commands = [shlex.join([sys.executable, ae.__file__, *options]) for options in (nano, ["--no_such_option"])]
    runs = [subprocess.Popen(["sh", "-c", f"{command} <&- >&- 2>&-"]) for command in commands]
    assert [run.wait() for run in runs] == [0, 2]
    assert len(list(Path("results").iterdir())) == 1

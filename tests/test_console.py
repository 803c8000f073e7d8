"""What is printed, and what becomes of errors: exit status, closed streams."""

import subprocess
import sys
from pathlib import Path

import pytest

import additional_experiments
from runner.console import Console, exit_status
from runner.files import NonFiniteError, UserError

SCRIPT = Path(additional_experiments.__file__)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("a"), 2, "error: a\n"),
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
    with pytest.raises(RuntimeError, match="shape"):
        exit_status(lambda: (_ for _ in ()).throw(RuntimeError("shape")))


def test_a_quiet_console_prints_results_and_warnings(capsys):
    for quiet, lines in ((False, "info\n\n| a |\n| --- |\n| 1 |\n"), (True, "| 1 |\n")):
        console = Console(quiet)
        console.info("info")
        console.table_row({"a": 1})
        console.warning("careful")
        assert capsys.readouterr() == (lines, "warning: careful\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    "closed", ["<&- >&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in ("<&-", ">&-", "2>&-"))]
)
def test_closed_streams(nano, tmp_path, closed):
    command = [sys.executable, SCRIPT, *nano, "--trainable_layers", "last_layer"]
    script = " ".join(f"'{word}'" for word in command)
    run = subprocess.run(["sh", "-c", f"{script} {closed}"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert len(list((tmp_path / "results").iterdir())) == 1
    assert ("Test accuracy" in run.stdout) == (" >&-" not in f" {closed}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_errors_with_closed_streams(tmp_path):
    for options, status in (("--no_such_option", 2), ("--report missing.csv", 2)):
        run = subprocess.run(["sh", "-c", f"'{sys.executable}' '{SCRIPT}' {options} >&- 2>&-"], cwd=tmp_path)
        assert run.returncode == status
